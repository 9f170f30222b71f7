"""Seed a built-in dataset into the catalog.

    mlflow run . -e seed --env-manager local -P dataset=golden-v2
    tunix-mlflow seed golden-v2
    tunix-mlflow seed golden-v2 num_traces=50 key=golden-v3

Seconds. The same dataset twice changes nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from tunix_mlflow.cli.arguments import parse
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.datasets import Built
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime import process
from tunix_mlflow.runtime.environment import prepare

from . import console

OWN = ("num_traces", "number", "key")


def seed(
    config: Config,
    *,
    num_traces: int | None = None,
    number: int | None = None,
    key: str | None = None,
) -> Built:
    """Generate `config.dataset`, store it, and record it as an input of a run.

    Raises:
        DatasetError: for an unknown seed, or a key that names another dataset.
    """
    from tunix_mlflow.data import datasets
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.run import session

    if config.dataset is None:
        raise ConfigError("dataset is missing; give dataset=KEY, for example golden-v2")
    store.connect(config.tracking)  # a dead server is said before anything is stored
    built = datasets.seed(config.dataset, num_traces=num_traces, seed=number, name=key)
    manifest = built.manifest
    console.say(
        f"{manifest.key}: {manifest.count} examples,"
        f" {manifest.stats['distinct_prompts']} distinct prompts,"
        f" {'stored' if built.created else 'identical to what is there'}"
    )
    with session(
        config, stage="seed", tags={"tunix_mlflow.dataset_digest": manifest.digest}
    ) as run:
        for split in manifest.splits:
            run.log_dataset(manifest, split, usage="seed")
        run.log_figures({f"dataset/{k}": float(v) for k, v in manifest.stats.items()})
    return built


def main(argv: Sequence[str]) -> None:
    """Parse, seed, print."""
    arguments = parse(argv, OWN, positional="dataset")
    config = arguments.load()
    prepare(config)
    numbers = {name: _whole(arguments.stage, name) for name in ("num_traces", "number")}
    built = seed(config, key=arguments.stage.get("key"), **numbers)
    console.result(
        dataset=built.manifest.key,
        digest=built.manifest.digest,
        examples=built.manifest.count,
        created=built.created,
    )


def _whole(arguments: dict[str, str], name: str) -> int | None:
    text = arguments.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name}: expected a whole number below 10^9, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(process.execute(main, sys.argv[1:]))
