"""tunix-mlflow: fine-tune language models with JAX, the MLflow-native way.

Every `import mlflow` imports this file, because it looks up our plugins. So nothing heavy may load
here: the public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunix_mlflow.version import __version__

__all__ = [
    "Config",
    "Run",
    "__version__",
    "evaluate",
    "load_config",
    "load_dataset",
    "load_model",
    "promote",
    "start_run",
    "train",
]

if TYPE_CHECKING:
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.config.schema import Config
    from tunix_mlflow.data.datasets import load_dataset
    from tunix_mlflow.pipelines.evaluate import evaluate
    from tunix_mlflow.pipelines.promote import promote
    from tunix_mlflow.pipelines.train import train
    from tunix_mlflow.tracking.models.flavor import load_model
    from tunix_mlflow.tracking.run import Run, start_run

_MODULES = {
    "Config": "tunix_mlflow.config.schema",
    "Run": "tunix_mlflow.tracking.run",
    "evaluate": "tunix_mlflow.pipelines.evaluate",
    "load_config": "tunix_mlflow.config.load",
    "load_dataset": "tunix_mlflow.data.datasets",
    "load_model": "tunix_mlflow.tracking.models.flavor",
    "promote": "tunix_mlflow.pipelines.promote",
    "start_run": "tunix_mlflow.tracking.run",
    "train": "tunix_mlflow.pipelines.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tunix_mlflow' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
