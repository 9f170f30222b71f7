"""Log a pretrained model as it is, so that it is evaluated and compared like a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models import decoder
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import pretrained
from tunix_mlflow.runtime import devices, environment
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import artifacts, store
from tunix_mlflow.tracking.run import open_run

_PROMPT = "What is the capital of France?"


class ImportResult(NamedTuple):
    """What was logged."""

    run_id: str
    model_id: str | None  # None: MLflow was away; `tunix-mlflow sync` logs the model
    link: str
    parameters: int


@store.restored()
def import_model(
    base: str,
    *,
    max_new_tokens: int = 128,
    config: Config | None = None,
    reporter: Reporter = SILENT,
) -> ImportResult:
    """Log a pretrained model in a run of its own.

    Args:
        base: a folder, a GGUF file, or runs:/ or models:/ of such a folder.
        max_new_tokens: the default length of its completions.
        config: `device` and `tracking` are read; None: the defaults.
        reporter: receives messages.

    Raises:
        ModelError: if it cannot be used; no run is started.
        TrackingError: if it cannot be fetched.
    """
    config = artifacts.anchored(msgspec.structs.replace(config or Config(), base=base))
    environment.require(config)
    with artifacts.base(config) as source:
        if source is None:
            raise ConfigError("base is missing; give a folder, a GGUF file or a URI")
        params, digest = bases.load(source, pretrained.on_device(devices.use(config.device)))
        graph = decoder.shape(source.config, source.config.vocab_size or 0)[0]
        bundle = bundles.Bundle(source.config, graph, params, source.tokenizer, max_new_tokens)
    weights = bundles.weights_digest(params)
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(base).name) or "base"
    with open_run(
        stage="import",
        tracking=config.tracking,
        name=config.tracking.run_name or f"import {name}",
        tags={"tunix_mlflow.base_digest": digest, "tunix_mlflow.weights_digest": weights},
        report=reporter.info,
    ) as run:
        run.log_params({"base": base, "max_new_tokens": max_new_tokens})
        folder = run.folder / "models" / f"{0:08d}-{weights[:12]}"
        bundles.save(bundle, folder)
        run.log_model(
            folder,
            name=name,
            step=0,
            prompts=[_PROMPT],
            tags={"tunix_mlflow.weights_digest": weights},
        )
        run.sync()
    return ImportResult(run.run_id, run.model_id, run.link, decoder.parameter_count(params))
