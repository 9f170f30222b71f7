"""Find deterministic datasets: built-in seeds by path, those of other packages by entry point,
and `reasoning-gym:FAMILY`.

A seed is a module (or any object) with `generate(*, seed, num_traces)` and `DEFAULT_TRACES`; if
it has `validate(examples)`, that is called with the result, and raises ValueError to refuse it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow import paths
from tunix_mlflow.data.examples import Example, Message, ReasoningTrace
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.files import one_line

DEFAULT_SEED = 42
GROUP = "tunix_mlflow.seeds"
GYM = "reasoning-gym:"


class Seed(NamedTuple):
    """A generator of traces."""

    key: str
    generate: Callable[..., Iterator[ReasoningTrace | Example]]
    default_traces: int
    validate: Callable[[list[Example]], None] | None = None


def names() -> list[str]:
    """Return the keys of the built-in seeds, and of those that other packages register."""
    return sorted({*_built_in(), *_plugins()})


def find(key: str) -> Seed | None:
    """Return the seed of a key, or None.

    Raises:
        DatasetError: if another package's seed cannot be loaded, or a family does not exist.
    """
    if key.startswith(GYM):
        return _gym(key)
    if key in _built_in():
        module = _load(_folder() / f"{key.replace('-', '_')}.py")
    elif key in (plugins := _plugins()):
        try:
            module = plugins[key].load()
            module.generate, module.DEFAULT_TRACES  # noqa: B018
        except Exception as error:  # another's code
            raise DatasetError(f"seed {key} ({plugins[key].value}): {one_line(error)}") from error
    else:
        return None
    return Seed(key, module.generate, module.DEFAULT_TRACES, getattr(module, "validate", None))


def dataset_key(key: str) -> str:
    """Return the default key of a seed's dataset."""
    if key.startswith(GYM):
        return f"reasoning-gym-{key.removeprefix(GYM)}-v1"
    return key


def examples(generator: Seed, *, seed: int, count: int) -> list[Example]:
    """Run a generator.

    Args:
        generator: the generator.
        seed: the random seed.
        count: number of traces.

    Raises:
        DatasetError: if the generator refuses the count, or its validator the result.
    """
    try:
        traces = generator.generate(seed=seed, num_traces=count)
        result = [t.example() if isinstance(t, ReasoningTrace) else t for t in traces]
        if generator.validate is not None:
            generator.validate(result)
    except ValueError as error:
        raise DatasetError(f"seed {generator.key}: {error}") from error
    return result


def _folder() -> Path:
    return paths.project_root() / "seeds"


def _built_in() -> list[str]:
    return [p.stem.replace("_", "-") for p in _folder().glob("*_v[0-9]*.py")]


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"tunix_mlflow_seed_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DatasetError(f"cannot load the seed {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _gym(key: str) -> Seed:
    family = key.removeprefix(GYM)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,80}", family):
        raise DatasetError(f"{key[:100]!r}: expected {GYM}FAMILY, for example {GYM}chain_sum")
    try:
        with warnings.catch_warnings(action="ignore"):  # its dependencies' own
            import reasoning_gym
    except ImportError as error:
        raise DatasetError(
            f"{key} needs the package reasoning-gym: pip install 'tunix-mlflow[seeds]'"
        ) from error

    def items(seed: int, count: int) -> list[dict[str, Any]]:
        # Some families draw from the module `random`; they get a state of their own.
        state = random.getstate()
        try:
            random.seed(seed)
            dataset = reasoning_gym.create_dataset(family, seed=seed, size=count)
            return [dict(dataset[i]) for i in range(count)]
        finally:
            random.setstate(state)

    def generate(*, seed: int, num_traces: int) -> Iterator[Example]:
        if num_traces < 1:
            raise ValueError("num_traces must be at least 1")
        try:
            first, again = items(seed, num_traces), items(seed, min(num_traces, 20))
        except Exception as error:  # another's code, with errors of every kind
            raise ValueError(one_line(error, 300)) from error
        if _core(first[: len(again)]) != _core(again):
            raise ValueError("the family is not deterministic: the same seed gave other items")
        for idx, item in enumerate(first):
            if item["answer"] is None:
                raise ValueError(f"item {idx} has no answer; the family has no unique answers")
            yield Example(
                messages=(Message(role="user", content=str(item["question"])),),
                answer=str(item["answer"]),
                meta={"source": "reasoning-gym", "family": family, "idx": idx},
            )

    return Seed(key, generate, 500)


def _core(items: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(str(item["question"]), str(item["answer"])) for item in items]
