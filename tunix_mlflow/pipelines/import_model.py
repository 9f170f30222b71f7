"""A pretrained model as a logged one, so that it is evaluated and compared as those it leads to."""

from __future__ import annotations

from typing import NamedTuple

from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models import decoder
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import pretrained
from tunix_mlflow.runtime import devices
from tunix_mlflow.tracking import artifacts
from tunix_mlflow.tracking.run import session

_PROMPT = "What is the capital of France?"


class Imported(NamedTuple):
    """What was logged."""

    run_id: str
    model_id: str | None  # None: MLflow was away, and is told later
    link: str
    parameters: int


def log(config: Config, max_new_tokens: int) -> Imported:
    """Log the model that `config.base` names, in a run of its own.

    Args:
        config: `base` and `tracking` are read.
        max_new_tokens: the default length of its completions.

    Raises:
        ModelError: if it cannot be used; no run is started.
        TrackingError: if it cannot be fetched.
    """
    config = artifacts.anchored(config)
    with artifacts.base(config) as base:
        if base is None:
            raise ConfigError("base is missing; give a folder, a GGUF file or a URI")
        params, digest = bases.load(base, pretrained.on_device(devices.use(config.device)))
        graph = decoder.shape(base.config, base.config.vocab_size or 0)[0]
        bundle = bundles.Bundle(base.config, graph, params, base.tokenizer, max_new_tokens)
    weights = bundles.weights_digest(params)
    tags = {"tunix_mlflow.base_digest": digest, "tunix_mlflow.weights_digest": weights}
    with session(config, stage="import", tags=tags) as run:
        place = run.folder / "models" / f"{0:08d}-{weights[:12]}"
        bundles.save(bundle, place)
        run.log_model(
            place, step=0, prompts=[_PROMPT], tags={"tunix_mlflow.weights_digest": weights}
        )
        run.sync()
    return Imported(run.run_id, run.model_id, run.link, decoder.parameter_count(params))
