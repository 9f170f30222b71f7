"""Runs a project script in this process, with our exit codes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from tunix_mlflow import paths
from tunix_mlflow.runtime import process

# Not `projects`: a user's own package of that name must not get in the way.
_PACKAGE = "tunix_mlflow_projects"


def stage(name: str, arguments: Sequence[str]) -> None:
    """Run projects/NAME.py and exit with its code."""
    if _PACKAGE not in sys.modules:
        folder = paths.project_root() / "projects"
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"no project scripts in {folder}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = module
        spec.loader.exec_module(module)
    script = importlib.import_module(f"{_PACKAGE}.{name}")
    sys.exit(process.execute(script.main, arguments))
