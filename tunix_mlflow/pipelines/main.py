"""All stages: seed, train, evaluate, register and promote, as one run with linked children."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import seeds
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.pipelines import notes, undelivered
from tunix_mlflow.pipelines.evaluate import EvaluationResult, evaluate
from tunix_mlflow.pipelines.promote import promote
from tunix_mlflow.pipelines.seed import seed
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.runs import lookup


class MainResult(NamedTuple):
    """What all stages together return."""

    dataset: str
    examples: int
    steps: int
    tokens_per_sec: float
    final_loss: float
    exact_match: float | None  # None: the dataset has no answers to compare with
    exact_match_interval: tuple[float, float] | None
    model: str
    version: str
    verdict: str
    run_id: str
    train_run_id: str
    link: str  # of the experiment
    ui: str | None  # the command that starts the UI on a local store


@store.restored()
def run_all(config: Config, *, reporter: Reporter = SILENT) -> MainResult:
    """Run the stages in order, each in a child run, in this process.

    Raises:
        TunixMlflowError: whatever a stage raises; the parent run fails with it.
    """
    with open_run(
        stage="main",
        tracking=config.tracking,
        name=config.tracking.run_name or f"main {config.dataset or ''}".rstrip(),
        report=reporter.info,
    ) as run:
        run.log_params({"dataset": config.dataset, "training.steps": config.training.steps})
        if config.dataset is not None and seeds.find(config.dataset) is not None:
            seed(config.dataset, config=config, reporter=reporter)
        trained = train(config, reporter=reporter)
        undelivered.check_model(trained.run_id)
        if trained.model_id is None:
            raise UnavailableError(
                f"MLflow does not have the model of run {trained.run_id}; train it again"
            )
        scored = evaluate(trained.model_id, config=config, reporter=reporter)
        measured = {
            "eval/loss": scored.loss,
            "eval/exact_match": scored.exact_match,
            "eval/exact_match_low": scored.low,
            "eval/exact_match_high": scored.high,
        }
        figures = {name: value for name, value in measured.items() if value is not None}
        for name in ("final_loss", "best_loss", "best_eval_loss", "avg_throughput"):
            if name in trained.figures:
                figures[name] = trained.figures[name]
        # Recorded before the gate, which may refuse.
        run.log_metrics(figures)
        run.set_tags({tags.TRAINING_RUN: trained.run_id})
        shown = {name: f"{value:,.4f}" for name, value in figures.items()}
        try:
            promotion = promote(trained.model_id, config=config, reporter=reporter)
            run.set_tags({tags.MODEL: promotion.name, tags.MODEL_VERSION: promotion.version})
            version = f"{promotion.name} {promotion.version}: {promotion.verdict}"
            shown["registered version"] = version
        finally:
            _note(run, shown)
        link = store.run_link(run.experiment_id or "")
    return MainResult(
        dataset=trained.manifest.key,
        examples=trained.manifest.count,
        steps=int(trained.figures["total_steps"]),
        tokens_per_sec=round(trained.figures["avg_throughput"]),
        final_loss=trained.figures["final_loss"],
        exact_match=scored.exact_match,
        exact_match_interval=_interval(scored),
        model=promotion.name,
        version=promotion.version,
        verdict=promotion.verdict,
        run_id=run.run_id,
        train_run_id=trained.run_id,
        link=link,
        ui=store.ui_command(),
    )


def _interval(scored: EvaluationResult) -> tuple[float, float] | None:
    return None if scored.low is None or scored.high is None else (scored.low, scored.high)


def _note(run: Run, figures: Mapping[str, str]) -> None:
    """Describe the run on its page: its figures, and links to its stages."""
    links = lookup.child_links(run.client, run.run_id, run.experiment_id or "")
    run.set_note(notes.main(figures, links))
