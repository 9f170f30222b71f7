"""Finds the built-in deterministic datasets: one file each in seeds/, loaded by path."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tunix_mlflow import state
from tunix_mlflow.data.examples import ReasoningTrace
from tunix_mlflow.errors import DatasetError

DEFAULT_SEED = 42


class Seed(NamedTuple):
    """A generator of traces."""

    key: str
    generate: Callable[..., Iterator[ReasoningTrace]]
    default_traces: int


def names() -> list[str]:
    """Keys of the built-in seeds."""
    return sorted(p.stem.replace("_", "-") for p in _folder().glob("*_v[0-9]*.py"))


def find(key: str) -> Seed | None:
    """The seed of this key, or None."""
    if key not in names():
        return None
    module = _load(_folder() / f"{key.replace('-', '_')}.py")
    return Seed(key, module.generate, module.DEFAULT_TRACES)


def traces(seed: Seed, *, number: int, count: int) -> list[ReasoningTrace]:
    """Run a generator.

    Raises:
        DatasetError: when it refuses the count.
    """
    try:
        return list(seed.generate(seed=number, num_traces=count))
    except ValueError as error:
        raise DatasetError(f"seed {seed.key}: {error}") from error


def _folder() -> Path:
    return state.project_root() / "seeds"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tunix_mlflow_seed_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DatasetError(f"cannot load the seed {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
