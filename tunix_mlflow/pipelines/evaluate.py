"""Score a logged model on one split of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from mlflow.tracking import MlflowClient

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets, snapshot
from tunix_mlflow.data.examples import Example, example_id
from tunix_mlflow.errors import ConfigError, DatasetError, ModelError
from tunix_mlflow.evaluation import scoring
from tunix_mlflow.evaluation.scoring import ExampleScore
from tunix_mlflow.evaluation.statistics import Proportion
from tunix_mlflow.input.tokens import describe_loss
from tunix_mlflow.pipelines import notes, undelivered
from tunix_mlflow.runtime import devices, environment
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.models import flavor, registry
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.run import open_run

if TYPE_CHECKING:
    from tunix_mlflow.models.bundle import Bundle

_READ_BY_TRAINING = {"training": "trained on", "validation": "chosen by"}
"""MLflow's contexts of the inputs of a training run, and what they say of the model."""


class EvaluationResult(NamedTuple):
    """What evaluation returns."""

    run_id: str
    link: str
    model_id: str
    dataset: str
    loss: float | None  # nats per token; None: the examples cannot be rendered
    exact_match: float | None  # 0..1; None: no example has an answer to compare with
    low: float | None  # of the 95 % interval
    high: float | None
    examples: int  # with an answer
    without_answer: int  # that count in the loss alone: texts, calls of tools


@store.restored()
def evaluate(
    model: str,
    *,
    dataset: str | None = None,
    config: Config | None = None,
    reporter: Reporter = SILENT,
) -> EvaluationResult:
    """Measure the loss on a split, and compare generated answers with the expected ones.

    An example without an expected answer, such as a text or a call of a tool, counts in the loss.

    Args:
        model: a run id, a model id or a models:/ URI.
        dataset: the dataset's key or digest; None: `config.dataset`.
        config: `evaluation`, `device` and `tracking` are read; None: the defaults.
        reporter: receives messages and progress.

    Raises:
        InputError: for a dataset, split or model that cannot be used.
        IntegrityError: if the model's files are not what was logged.
        UnavailableError: if this machine has a model of the run that MLflow does not have.
    """
    config = config or Config()
    key = dataset or config.dataset
    if key is None:
        raise ConfigError("dataset is missing; give --dataset KEY")
    config = msgspec.structs.replace(config, dataset=key)
    environment.require(config)
    client = store.connect(config.tracking)
    manifest = datasets.ready(key, reporter.info)
    chosen, split = config.evaluation, config.evaluation.split
    read = snapshot.read(manifest.digest, split)[: chosen.limit]
    if not read:
        raise DatasetError(
            f"dataset {manifest.key} has no example in split {split!r};"
            f" its splits: {', '.join(manifest.splits)}. Set evaluation.split"
        )
    examples = scoring.scorable(read, None)
    without_answer = len(read) - len(examples)
    devices.use(config.device)
    undelivered.deliver(client, model, reporter.info)
    undelivered.check_model(model)
    logged = registry.resolve(client, model)
    bundle = flavor.load_model(f"models:/{logged.model_id}")
    with open_run(
        stage="evaluate",
        tracking=config.tracking,
        name=config.tracking.run_name or f"evaluate {manifest.key}",
        tags={
            "tunix_mlflow.dataset": manifest.key,
            "tunix_mlflow.dataset_digest": manifest.digest,
            **registry.training_run_tag(logged),
        },
        report=reporter.info,
    ) as run:
        given = TunixMlflowDataset(manifest, split)
        run.log_params(
            {
                "model": logged.model_id,
                "dataset": manifest.key,
                "evaluation.split": split,
                "evaluation.limit": chosen.limit,
                "evaluation.batch_size": chosen.batch_size,
                "evaluation.max_new_tokens": chosen.max_new_tokens or bundle.max_new_tokens,
            }
        )
        run.log_input(given, context="evaluation")
        run.log_model_input(logged.model_id)
        link = registry.training_run_link(client, logged)
        run.set_note(notes.of_model("Evaluation", logged.model_id, link))
        scores = scoring.score(
            examples,
            lambda part: bundle.complete(part, chosen.max_new_tokens),
            chosen.batch_size,
            progress=lambda done: reporter.progress("evaluate", done, len(examples), {}),
        )
        share = scoring.exact_match(scores) if scores else None
        trained_on = _read_by_training(client, logged.source_run_id, given)
        reasons = [_not_the_whole_split(config, bundle.max_new_tokens), trained_on]
        reason = "; ".join(each for each in reasons if each is not None)
        if reason:
            reporter.info(f"{reason}: the figure is on this run only, and counts for no gate")
        loss, left_out = _held_out_loss(bundle, read, chosen.batch_size, reporter)
        measured = {} if loss is None else {"eval/loss": loss}
        if left_out is not None:  # such a loss is on the run only
            run.set_tags({"tunix_mlflow.not_in_loss": left_out})
            run.log_metrics(measured)
            measured = {}
        run.log_metrics(
            {
                **measured,
                **_figures(share),
                "eval/examples": float(len(examples)),
                "eval/without_answer": float(without_answer),
            },
            model_id=None if reason else logged.model_id,
            dataset=None if reason else given,
        )
        run.log_table(scoring.table(scores), "examples.json")
    _report_unanswered(scores, reporter)
    if without_answer:
        reporter.info(
            f"{without_answer} of {len(read)} examples have no answer to compare with, as texts and"
            " calls of tools have not, and count in the loss alone"
        )
    summary = _summary(loss, share, "" if trained_on else "held-out ")
    reporter.info(f"{summary}, {len(read)} examples of {manifest.key}/{split}")
    return EvaluationResult(
        run_id=run.run_id,
        link=run.link,
        model_id=logged.model_id,
        dataset=manifest.key,
        loss=loss,
        exact_match=share.value if share else None,
        low=share.low if share else None,
        high=share.high if share else None,
        examples=len(examples),
        without_answer=without_answer,
    )


def _figures(share: Proportion | None) -> dict[str, float]:
    if share is None:
        return {}
    return {
        "eval/exact_match": share.value,
        "eval/exact_match_low": share.low,
        "eval/exact_match_high": share.high,
    }


def _summary(loss: float | None, share: Proportion | None, kind: str) -> str:
    parts = [] if loss is None else [f"{kind}loss {loss:.4f}"]
    if share is not None:
        parts.append(
            f"{kind}exact match {share.value:.4f}, 95 % interval {share.low:.4f} to"
            f" {share.high:.4f}"
        )
    return "; ".join(parts) or "nothing was measured"


def _held_out_loss(
    bundle: Bundle, examples: list[Example], batch_size: int, reporter: Reporter
) -> tuple[float | None, str | None]:
    """Return the loss on the examples, or None, and a line on those that it is not of."""
    from tunix_mlflow.training.held_out import held_out_loss  # late: it loads the optimizers

    try:
        found = held_out_loss(bundle, examples, batch_size)
    except (DatasetError, ModelError) as error:
        reporter.info(f"no loss: {error}")
        return None, str(error)
    for loss in found.losses:
        line = describe_loss(loss, len(examples), example_id(examples[loss.first_example]))
        reporter.info(f"loss: {line}")
    left_out = None
    if found.refused:
        left_out = f"{len(found.refused)} of {len(examples)}, first {found.refused[0]}"
        reporter.info(f"loss: without {left_out}: it is on this run only, and counts for no gate")
    for count, what in ((found.truncated, "cut"), (found.empty, "left out")):
        if count:
            reporter.info(f"loss: {count} of {len(examples)} examples are {what}")
    return found.loss, left_out


def _report_unanswered(scores: Sequence[ExampleScore], reporter: Reporter) -> None:
    """Name what counts as wrong without an answer: prompts that failed, completions cut off."""
    failed = [row for row in scores if row.error is not None]
    cut_off = sum(row.finish_reason == "length" for row in scores)
    if failed:
        first = f"{failed[0].prompt[:60]!r}: {failed[0].error}"
        reporter.info(f"{len(failed)} of {len(scores)} examples were not answered, first {first}")
    if cut_off:
        reporter.info(
            f"{cut_off} of {len(scores)} completions were cut off, and count as wrong; see"
            " evaluation.max_new_tokens"
        )


def _not_the_whole_split(config: Config, max_new_tokens: int) -> str | None:
    """Return why a figure is not that of the whole split, as the model is served."""
    if config.evaluation.limit is not None:
        return "evaluation.limit is set"
    if config.evaluation.max_new_tokens not in (None, max_new_tokens):
        return f"evaluation.max_new_tokens is not the model's own {max_new_tokens}"
    return None


def _read_by_training(
    client: MlflowClient, run_id: str | None, dataset: TunixMlflowDataset
) -> str | None:
    """Return why a figure on this split is not independent of the training, if it is not."""
    inputs = client.get_run(run_id).inputs if run_id else None
    for given in inputs.dataset_inputs if inputs else []:
        context = {tag.key: tag.value for tag in given.tags}.get("mlflow.data.context")
        if context in _READ_BY_TRAINING and given.dataset.digest == dataset.digest:
            return f"the model was {_READ_BY_TRAINING[context]} {dataset.name}"
    return None
