"""The commands that are stages of the pipeline: one call each, and what they print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunix_mlflow.cli.arguments import ConfigurableCommand, Number
from tunix_mlflow.errors import ConfigError, InputError
from tunix_mlflow.paths import sqlite_uri
from tunix_mlflow.runtime.process import set_defaults

if TYPE_CHECKING:
    from tunix_mlflow.config.schema import Config
    from tunix_mlflow.pipelines.main import MainResult
    from tunix_mlflow.pipelines.resume import Resumption
    from tunix_mlflow.pipelines.train import TrainResult

AUTO = "auto"
_TRAIN, _PRETRAINED, _MAIN = "golden-v2", "pretrained", "column-addition"  # presets by default
_config = click.option("--config", metavar="FILE", help="A YAML file or a preset.")


@click.command(cls=ConfigurableCommand)
@click.argument("dataset", metavar="KEY")
@click.option("--num-traces", type=Number(1), help="How many traces to generate.")
@click.option("--seed", type=Number(0), help="Another seed of the random numbers.")
@click.option("--key", metavar="NAME-vN", help="Store the dataset under another key.")
def seed(
    dataset: str,
    num_traces: int | None,
    seed: int | None,
    key: str | None,
    overrides: dict[str, str],
) -> None:
    """Store a built-in deterministic dataset in the catalog.

    \b
    KEY is golden-v1, golden-v2, column-addition-v1, dev-reasoning-v1, dev-reasoning-v2, eval-v2,
    reasoning-gym:FAMILY (needs the extra `seeds`), or a seed of another package.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.pipelines import seed as pipeline

    config = load_config(None, overrides)
    with Terminal() as reporter:
        built = pipeline.seed(
            dataset, num_traces=num_traces, seed=seed, name=key, config=config, reporter=reporter
        )
    manifest = built.manifest
    print_result(
        dataset=manifest.key,
        digest=manifest.digest,
        examples=manifest.count,
        created=built.created,
    )


@click.command(cls=ConfigurableCommand)
@click.argument("config", required=False)
@click.option("--plan", is_flag=True, help="Show what a run would train on and need; do not train.")
@click.option("--force", is_flag=True, help="Train even if memory is forecast to be too small.")
@click.option(
    "--resume", metavar="RUN_ID|auto", help="Resume a run; auto: the one with tracking.key, if any."
)
@click.option("--step", type=Number(0), help="Resume at the checkpoint of this step.")
@click.option("--fork", is_flag=True, help="Begin a new run at the checkpoint of --resume.")
def train(
    config: str | None,
    plan: bool,
    force: bool,
    resume: str | None,
    step: int | None,
    fork: bool,
    overrides: dict[str, str],
) -> None:
    """Train a model.

    CONFIG is a YAML file or a preset, such as golden-v2 or column-addition. Without it, the model,
    optimizer and steps are those of golden-v2, or of pretrained if there is a base.

    \b
    tunix-mlflow train column-addition training.steps=200 optimizer.learning_rate=5e-3
    tunix-mlflow train dataset=support-v1 device=gpu:0
    tunix-mlflow train dataset=support-v1 base=FOLDER lora.rank=16 --plan
    tunix-mlflow train golden-v2 --resume auto tracking.key=job-17
    """
    _train(_resolve_run(config, resume, step, fork, overrides), plan=plan, force=force)


@click.command(cls=ConfigurableCommand)
@click.argument("run_id")
@click.option("--step", type=Number(0), help="Resume at the checkpoint of this step.")
@click.option("--fork", is_flag=True, help="Begin a new run there; any key may change.")
@click.option("--force", is_flag=True, help="Train even if memory is forecast to be too small.")
@click.option(
    "--take-over",
    metavar="REASON",
    help="Do not wait for another process's lease on the run; that one stops.",
)
def resume(
    run_id: str,
    step: int | None,
    fork: bool,
    force: bool,
    take_over: str | None,
    overrides: dict[str, str],
) -> None:
    """Resume a training run, in the same MLflow run, here or on another machine.

    The number of steps, how often to evaluate and save, and where to record may change. Keys that
    determine the parameters may not.

    \b
    tunix-mlflow resume RUN_ID training.steps=400
    tunix-mlflow resume RUN_ID --step 100 --fork optimizer.learning_rate=1e-4
    """
    from tunix_mlflow.cli.terminal import Terminal
    from tunix_mlflow.pipelines.resume import resume_run

    run = resume_run(
        run_id, overrides, step=step, fork=fork, take_over=take_over, reporter=Terminal()
    )
    _train(run, plan=False, force=force)


@click.command(cls=ConfigurableCommand)
@click.argument("model")
@click.option("--dataset", metavar="KEY", help="The dataset to score on.")
@click.option("--split", help="Its split.  [default: test]")
@click.option("--limit", type=Number(1), help="Score only the first so many examples.")
@_config
def evaluate(
    model: str,
    dataset: str | None,
    split: str | None,
    limit: int | None,
    config: str | None,
    overrides: dict[str, Any],
) -> None:
    """Score a logged model on the test split of a dataset.

    MODEL is a run id, a model id or a models:/ URI.

    \b
    tunix-mlflow evaluate models:/support@champion --dataset support-v1
    """
    given = {"evaluation.split": split, "evaluation.limit": limit}
    loaded = _load(config, overrides | {k: v for k, v in given.items() if v is not None})
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.pipelines import evaluate as pipeline

    with Terminal() as reporter:
        result = pipeline.evaluate(model, dataset=dataset, config=loaded, reporter=reporter)
    print_result(**result._asdict())


@click.command(cls=ConfigurableCommand)
@click.argument("model")
@click.argument("name", required=False)
@click.option(
    "--dataset", metavar="KEY", help="Read the figures on this dataset.  [default: last evaluated]"
)
@_config
def promote(
    model: str,
    name: str | None,
    dataset: str | None,
    config: str | None,
    overrides: dict[str, str],
) -> None:
    """Register a model as challenger, and make it champion if it passes the gate.

    MODEL is a run id, a model id or a models:/ URI. NAME is the registered model's name; without
    it, the dataset's name without its version. Exit code 3 when the gate refuses; the tag
    tunix_mlflow.promotion of the registered version says why.

    \b
    tunix-mlflow promote RUN_ID support 'promotion.thresholds={exact_match: 0.9}'
    """
    loaded = _load(config, overrides)
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.pipelines import promote as pipeline

    with Terminal() as reporter:
        result = pipeline.promote(model, name, dataset=dataset, config=loaded, reporter=reporter)
    print_result(**result._asdict())


@click.command(cls=ConfigurableCommand)
@click.argument("config", required=False)
def main(config: str | None, overrides: dict[str, str]) -> None:
    """Seed, train, evaluate and promote, as linked runs below one parent run.

    CONFIG is a YAML file or a preset; column-addition without it.
    """
    loaded = _load(config or _MAIN, overrides)
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.pipelines import main as pipeline

    with Terminal() as reporter:
        result = pipeline.run_all(loaded, reporter=reporter)
        _report_main(result, reporter)
    print_result(**result._asdict())


@click.command(cls=ConfigurableCommand)
@click.pass_context
def demo(ctx: click.Context, overrides: dict[str, str]) -> None:
    """Seed, train, evaluate and promote a model, all below ./.demo.

    Uses a state root and a tracking store of its own there, whatever the environment names.
    """
    folder = Path(".demo").absolute()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}") from error
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "TUNIX_MLFLOW_"))]:
        del os.environ[name]
    set_defaults()
    os.environ["TUNIX_MLFLOW_HOME"] = str(folder / "state")
    os.environ["MLFLOW_TRACKING_URI"] = sqlite_uri(folder / "mlflow.db")
    ctx.invoke(main, config=None, overrides=overrides)


def _load(source: str | None, overrides: dict[str, Any]) -> Config:
    """Return the configuration, with its environment exported."""
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.runtime.environment import export

    config = load_config(source, overrides)
    export(config)
    return config


def _resolve_run(
    source: str | None,
    resume: str | None,
    step: int | None,
    fork: bool,
    overrides: dict[str, str],
) -> Resumption:
    """Return the run that `train` begins or resumes."""
    from tunix_mlflow.cli.terminal import Terminal
    from tunix_mlflow.config.load import load_config

    if resume is not None and resume != AUTO:
        if source not in (None, _TRAIN):  # MLproject always passes its default
            raise ConfigError(
                "a resumed run keeps its configuration; give only KEY=VALUE to change it"
            )
        from tunix_mlflow.pipelines.resume import resume_run

        return resume_run(resume, overrides, step=step, fork=fork, reporter=Terminal())
    if step is not None or fork:
        raise ConfigError("--step and --fork need --resume RUN_ID")
    if "base" in overrides and source in (None, _TRAIN):
        source = _PRETRAINED
    config = load_config(source or _TRAIN, overrides)  # a mistake does not wait for MLflow
    from tunix_mlflow.pipelines.resume import Resumption, resume_by_key

    if resume == AUTO:
        return resume_by_key(config, reporter=Terminal())
    return Resumption(config, {}, None)


def _train(run: Resumption, *, plan: bool, force: bool) -> None:
    """Train, and print the result."""
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.runtime.environment import export

    with Terminal() as reporter:
        if run.finished and run.point is not None:
            reporter.info(f"run {run.point.run_id} has finished already")
            print_result(run_id=run.point.run_id, finished=True)
            return
        export(run.config, run.environment)
        from tunix_mlflow.pipelines import train as pipeline

        if plan:
            print_result(**pipeline.plan(run.config, reporter=reporter)._asdict())
            return
        result = pipeline.train(run.config, resume=run.point, force=force, reporter=reporter)
        _report_training(result, reporter)
    print_result(
        run_id=result.run_id,
        model_id=result.model_id,
        dataset=result.manifest.key,
        **result.figures,
    )


def _report_training(result: TrainResult, reporter: Any) -> None:
    figures = result.figures
    if "final_loss" in figures:  # else there was no update: the model is that of a checkpoint
        reporter.info(
            f"final loss {figures['final_loss']:.4f} after {figures['total_steps']:,.0f} steps,"
            f" {figures['avg_throughput']:,.0f} tokens/s"
        )
    names = {
        "validation/loss": "validation loss",
        "validation/exact_match": "validation exact match",
    }
    for key, name in names.items():
        if key in figures:
            reporter.info(f"{name} {figures[key]:.4f}")
    reporter.info(f"run {result.run_id}: {result.link}")
    if result.ui:
        reporter.info(f"to open the MLflow UI: {result.ui}")


def _report_main(result: MainResult, reporter: Any) -> None:
    measured = None
    if result.exact_match_interval is not None:
        low, high = result.exact_match_interval
        measured = f"{result.exact_match:.4f} (95 % interval {low:.4f} to {high:.4f})"
    lines = {
        "dataset": f"{result.dataset}, {result.examples:,} examples",
        "steps": f"{result.steps:,}",
        "tokens/s": f"{result.tokens_per_sec:,.0f}",
        "final loss": f"{result.final_loss:.4f}",
        "test exact match": measured,
        "model": f"{result.model} version {result.version}: {result.verdict}",
        "MLflow UI": result.ui or "",
        "experiment": result.link,
    }
    reporter.info("")
    for name, value in lines.items():
        if value:
            reporter.info(f"{name:<20}{value}")
