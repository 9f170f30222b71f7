"""tunix-mlflow: fine-tune language models with JAX, the MLflow-native way.

Every `import mlflow` imports this file, because it looks up our plugins. So nothing heavy
may load here: the public names are fetched when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Config", "RunSession", "session"]

if TYPE_CHECKING:
    from tunix_mlflow.config.schema import Config
    from tunix_mlflow.tracking.run import RunSession, session

_WHERE = {
    "Config": "tunix_mlflow.config.schema",
    "RunSession": "tunix_mlflow.tracking.run",
    "session": "tunix_mlflow.tracking.run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tunix_mlflow' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
