"""`tunix-mlflow`: the verbs launch the project's entry points; `datasets` tends the catalog.

This file loads click alone, so that --help is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tunix_mlflow import __version__
from tunix_mlflow.cli import launch
from tunix_mlflow.cli.bench import bench
from tunix_mlflow.cli.checkpoints import checkpoints
from tunix_mlflow.cli.datasets import datasets
from tunix_mlflow.cli.models import models
from tunix_mlflow.cli.runs import runs
from tunix_mlflow.errors import InputError, Interrupted
from tunix_mlflow.runtime import process

_COMPUTING = ("train", "resume", "evaluate", "demo", "bench")
_ARGUMENTS = {"ignore_unknown_options": True, "help_option_names": ["--help"]}


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="tunix-mlflow")
def cli() -> None:
    """Fine-tune language models with JAX, the MLflow-native way.

    Runs are recorded where MLFLOW_TRACKING_URI says; the catalog, snapshots and checkpoints
    live below TUNIX_MLFLOW_HOME (default ~/.tunix-mlflow).
    """


cli.add_command(datasets)
cli.add_command(runs)
cli.add_command(checkpoints)
cli.add_command(models)
cli.add_command(bench)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="SEED [key=value]...")
def seed(arguments: tuple[str, ...]) -> None:
    """Store a deterministic dataset in the catalog.

    \b
    golden-v1, golden-v2, column-addition-v1, dev-reasoning-v1, dev-reasoning-v2, eval-v2,
    reasoning-gym:FAMILY (extra seeds), and those of other packages

    num_traces=N makes another number of traces, number=N uses another random seed, and
    key=NAME-vN stores it under another key.
    """
    launch.stage("seed", arguments)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG] [key=value]...")
def train(arguments: tuple[str, ...]) -> None:
    """Train a model; CONFIG is a YAML file or a preset: golden-v2, column-addition.

    Without CONFIG, the model, optimizer and steps are those of golden-v2.

    \b
    tunix-mlflow train column-addition training.steps=200 optimizer.learning_rate=5e-3
    tunix-mlflow train dataset=support-v1 device=gpu:0
    tunix-mlflow train dataset=support-v1 base=FOLDER lora.rank=16 --plan

    base=FOLDER begins with a pretrained model. --plan shows what the run would be and need, and
    trains nothing; --force trains even if the device's memory is forecast to be too small.
    """
    launch.stage("train", arguments)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("run_id")
@click.option("--step", type=int, help="Begin at the checkpoint of this step, not the newest.")
@click.option("--fork", is_flag=True, help="Begin a run of its own there; anything may change.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[key=value]...")
def resume(run_id: str, step: int | None, fork: bool, arguments: tuple[str, ...]) -> None:
    """Go on with a training run, in the same MLflow run, here or on another machine.

    What decides the path of the parameters stays; the number of steps, how often to evaluate
    and save, and where to record may change.

    \b
    tunix-mlflow resume RUN_ID training.steps=400
    tunix-mlflow resume RUN_ID --step 100 --fork optimizer.learning_rate=1e-4
    """
    words = ["--resume", run_id, *arguments]
    words += ["--step", str(step)] if step is not None else []
    words += ["--fork", "true"] if fork else []
    launch.stage("train", words)


@cli.command()
@click.argument("run_id", required=False)
def sync(run_id: str | None) -> None:
    """Tell MLflow what it does not have yet: of one run, or of all on this machine."""
    from tunix_mlflow.cli import runs as commands

    commands.sync(run_id)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [key=value]...")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Score a model on held-out examples; MODEL is a run id or a models:/ URI.

    \b
    tunix-mlflow evaluate models:/support@champion dataset=support-v1 evaluation.limit=500
    """
    launch.stage("evaluate", arguments)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [key=value]...")
def promote(arguments: tuple[str, ...]) -> None:
    """Register a model as challenger, and make it champion if it passes the gate.

    Exit code 3 when the gate refuses.

    \b
    tunix-mlflow promote RUN_ID name=support promotion.thresholds.exact_match=0.9
    """
    launch.stage("promote", arguments)


@cli.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[key=value]...")
def demo(arguments: tuple[str, ...]) -> None:
    """Seed, train, evaluate, register and promote a model, all below ./.demo.

    Uses its own state root and tracking store there, whatever the environment names.
    """
    place = Path(".demo").absolute()
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {place}: {error.strerror}") from error
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "TUNIX_MLFLOW_"))]:
        del os.environ[name]
    os.environ["TUNIX_MLFLOW_HOME"] = str(place / "state")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place / 'mlflow.db'}"
    launch.stage("main", arguments)


def main() -> None:
    """The console script."""
    process.run(_run, computes=any(verb in _COMPUTING for verb in sys.argv[1:2]))


def _run(argv: Sequence[str]) -> None:
    try:
        # Not standalone, so that click's own complaints are one line too.
        cli.main(list(argv), prog_name="tunix-mlflow", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        raise InputError(f"{error.format_message()} See `tunix-mlflow --help`") from error
    except click.Abort as error:
        raise Interrupted(signal.SIGINT) from error


if __name__ == "__main__":
    main()
