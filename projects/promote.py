"""Register a logged model as `challenger`, and make it `champion` if it passes the gate.

    mlflow run . -e promote --env-manager local -P model=RUN_ID -P name=support
    tunix-mlflow promote RUN_ID name=support promotion.thresholds.exact_match=0.9

Exit code 3 when the gate refuses; the registered version's tag tunix_mlflow.promotion says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from tunix_mlflow.cli.arguments import parse
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime import process
from tunix_mlflow.runtime.environment import prepare

from . import console

if TYPE_CHECKING:
    from tunix_mlflow.tracking.models.registry import Promotion

OWN = ("model", "name")


def promote(config: Config, model: str) -> Promotion:
    """Put a model through the gate.

    Args:
        config: `promotion` and `dataset` (the one to judge on; None: the last evaluated).
        model: run id, model id or models:/ URI.

    Raises:
        TrackingError: if there is no such model.
        Refused: with the reason, which the run and the version record.
    """
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.models import registry
    from tunix_mlflow.tracking.run import session

    client = store.connect(config.tracking)
    logged = registry.resolve(client, model)
    name = config.promotion.model or _name(config, logged.tags)
    with session(config, stage="promote", tags={"tunix_mlflow.model": name}) as run:
        run.log_model_input(logged.model_id)
        done = registry.promote(
            client,
            logged,
            name,
            thresholds=config.promotion.thresholds,
            dataset=config.dataset,
        )
        run.set_tags(
            {registry.VERDICT_TAG: done.verdict, "tunix_mlflow.model_version": done.version}
        )
    console.say(f"{done.name} version {done.version}: {done.verdict}")
    return done


def main(argv: Sequence[str]) -> None:
    """Parse, promote, print."""
    arguments = parse(argv, OWN, positional="model")
    model = arguments.require("model", "a run id or a models:/ URI")
    config = arguments.load()
    if "name" in arguments.stage:
        promotion = msgspec.structs.replace(config.promotion, model=arguments.stage["name"])
        config = msgspec.structs.replace(config, promotion=promotion)
    prepare(config)
    console.result(**promote(config, model)._asdict())


def _name(config: Config, tags: dict[str, str]) -> str:
    key = config.dataset or tags.get("tunix_mlflow.dataset")
    if key is None:
        raise ConfigError("name is missing; give name=REGISTERED_MODEL")
    return key.rpartition("-")[0] or key


if __name__ == "__main__":
    sys.exit(process.execute(main, sys.argv[1:]))
