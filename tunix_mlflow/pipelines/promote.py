"""Register a logged model as `challenger`, and make it `champion` if it passes the gate."""

from __future__ import annotations

from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.pipelines import notes, undelivered
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.models import gate, registry
from tunix_mlflow.tracking.models.gate import Promotion
from tunix_mlflow.tracking.run import open_run


@store.restored()
def promote(
    model: str,
    name: str | None = None,
    *,
    dataset: str | None = None,
    config: Config | None = None,
    reporter: Reporter = SILENT,
) -> Promotion:
    """Put a model through the gate.

    Args:
        model: a run id, a model id or a models:/ URI.
        name: the registered model; None: `promotion.model`, else the name of the dataset to judge
            on, else of the one that the model was trained on.
        dataset: key of the dataset to judge on; None: `config.dataset`, else the one that the model
            was last evaluated on.
        config: `promotion` and `tracking` are read; None: the defaults.
        reporter: receives messages.

    Raises:
        ConfigError: for a threshold that is none.
        TrackingError: if there is no such model.
        Refused: with the reason, which the run and the registered version record.
        UnavailableError: if the model, or an evaluation of it, waits for MLflow on this machine.
    """
    config = config or Config()
    if counts := [m for m in config.promotion.thresholds if m in gate.COUNTS]:
        raise ConfigError(f"promotion.thresholds: eval/{counts[0]} is a count, not a quality")
    key = dataset or config.dataset
    client = store.connect(config.tracking)
    undelivered.deliver(client, model, reporter.info)
    undelivered.check_model(model)
    logged = registry.resolve(client, model)
    undelivered.check_evaluations(logged.model_id)
    name = name or config.promotion.model or _name(key or logged.tags.get("tunix_mlflow.dataset"))
    with open_run(
        stage="promote",
        tracking=config.tracking,
        name=config.tracking.run_name or f"promote {name}",
        tags={tags.MODEL: name, **registry.training_run_tag(logged)},
        report=reporter.info,
    ) as run:
        params = {"model": logged.model_id, "promotion.model": name}
        if key is not None:
            params["dataset"] = key
        thresholds = config.promotion.thresholds
        run.log_params(
            params | {f"promotion.thresholds.{metric}": v for metric, v in thresholds.items()}
        )
        run.log_model_input(logged.model_id)
        link = registry.training_run_link(client, logged)
        run.set_note(notes.of_model(f"Promotion to `{name}`", logged.model_id, link))
        promotion = gate.promote(client, logged, name, thresholds=thresholds, dataset=key)
        run.set_tags(
            {
                tags.PROMOTION: promotion.verdict,
                tags.MODEL_VERSION: promotion.version,
            }
        )
    reporter.info(f"{promotion.name} version {promotion.version}: {promotion.verdict}")
    return promotion


def _name(key: str | None) -> str:
    if key is None:
        raise ConfigError("the name of the registered model is missing; give MODEL NAME")
    return key.rpartition("-")[0] or key
