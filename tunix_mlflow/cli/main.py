"""`tunix-mlflow`: the stages, and groups of commands for datasets, runs, checkpoints and models.

This file and the modules that it imports load click and nothing else, so that --help is quick.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from tunix_mlflow.cli import stages
from tunix_mlflow.cli.bench import bench
from tunix_mlflow.cli.checkpoints import checkpoints
from tunix_mlflow.cli.clean import clean
from tunix_mlflow.cli.datasets import datasets
from tunix_mlflow.cli.doctor import doctor
from tunix_mlflow.cli.models import models
from tunix_mlflow.cli.runs import runs, sync
from tunix_mlflow.errors import InputError, Interrupted, UnavailableError
from tunix_mlflow.runtime import process
from tunix_mlflow.version import __version__

_COMPUTE = ("train", "resume", "evaluate", "main", "demo", "bench")
"""Commands that are worth a restart for huge pages."""


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="tunix-mlflow")
def cli() -> None:
    """Fine-tune language models with JAX, the MLflow-native way.

    Runs are recorded where MLFLOW_TRACKING_URI says; the catalog, snapshots and checkpoints are
    below TUNIX_MLFLOW_HOME (default ~/.tunix-mlflow). Configuration keys are given as key=value, in
    YAML; README explains them.

    Exit codes: 0; 2 a user's mistake; 3 refused by a gate or a check; 4 disk, memory, network or a
    lock is not available, or MLflow refused a request or a part of a run, worth a retry; 130 and
    143 signals; 1 anything else.
    """


for _command in (
    *(stages.seed, stages.train, stages.resume, stages.evaluate, stages.promote),
    *(stages.main, stages.demo, sync, bench, datasets, runs, checkpoints, models, doctor, clean),
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run `tunix-mlflow` with the arguments of this process."""
    process.run(invoke, sys.argv[1:], compute=any(word in _COMPUTE for word in sys.argv[1:2]))


def run_command(name: str) -> NoReturn:
    """Run the command `name` with the arguments of this process: a script of projects/."""
    process.run(invoke, [name, *sys.argv[1:]], compute=name in _COMPUTE)


def invoke(argv: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        TunixMlflowError: instead of click's own errors, so that each is one line.
    """
    _incomplete_runs().clear()
    try:
        cli.main(list(argv), prog_name="tunix-mlflow", standalone_mode=False)
        _check_complete()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "tunix-mlflow"
        message = error.format_message().rstrip(".")
        raise InputError(f"{message}. See `{path} --help`") from error
    except click.Abort as error:
        raise Interrupted(signal.SIGINT) from error


def _check_complete() -> None:
    """Check that MLflow has all of the runs that the command made.

    Raises:
        UnavailableError: if it refuses a part of one.
    """
    if runs := ", ".join(dict.fromkeys(_incomplete_runs())):
        raise UnavailableError(
            f"MLflow does not have all of run {runs}, see above and the tag"
            " tunix_mlflow.incomplete; tracking.incomplete=allow accepts that"
        )


def _incomplete_runs() -> list[str]:
    """The runs of this process of which MLflow refused a part; none if MLflow was not loaded."""
    module = sys.modules.get("tunix_mlflow.tracking.ending")
    found: list[str] = [] if module is None else module.incomplete
    return found


if __name__ == "__main__":
    main()
