"""`tunix-mlflow checkpoints`: what is kept, whether it is whole, and what may go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from tunix_mlflow.errors import IntegrityError

if TYPE_CHECKING:
    from tunix_mlflow.tracking.runs.retention import Entry

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_run = click.option("--run", "run_id", help="Of this run alone.")


@click.group()
def checkpoints() -> None:
    """Tend the checkpoints of all runs, here and in the artifact store."""


@checkpoints.command("list")
@_run
@_json
def list_(run_id: str | None, as_json: bool) -> None:
    """Every checkpoint, where it is and how large."""
    _, found = _survey(run_id, 1, 0, "eval/loss", "min", 0)
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in found]))
        return
    for entry in found:
        click.echo(_line(entry))
    click.echo(f"{len(found)} checkpoints, {_mib(found)}")


@checkpoints.command()
@_run
@_json
def verify(run_id: str | None, as_json: bool) -> None:
    """Check every file of every checkpoint; exit code 3 if one is damaged."""
    from tunix_mlflow.tracking.runs import retention

    client, found = _survey(run_id, 1, 0, "eval/loss", "min", 0)
    damaged = []
    for entry in found:
        reason = retention.damage(client, entry)
        if reason is not None:
            damaged.append(_plain(entry) | {"damage": reason})
        if not as_json:
            click.echo(f"{_line(entry)}  {reason or 'whole'}")
    if as_json:
        click.echo(json.dumps({"checked": len(found), "damaged": damaged}))
    if damaged:
        raise IntegrityError(f"{len(damaged)} of {len(found)} checkpoints are damaged")


@checkpoints.command()
@click.option("--keep-last", type=click.IntRange(1), default=1, show_default=True)
@click.option("--keep-best", type=click.IntRange(0), default=0, show_default=True)
@click.option("--metric", default="eval/loss", show_default=True, help="For --keep-best.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", show_default=True)
@click.option("--keep-every", type=click.IntRange(0), default=0, help="Multiples of so many steps.")
@_run
@click.option("--yes", is_flag=True, help="Delete; else only show what would go.")
@_json
def prune(
    keep_last: int,
    keep_best: int,
    metric: str,
    mode: str,
    keep_every: int,
    run_id: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete checkpoints that nothing needs.

    Stays in any case: what a registered version was made from, the two newest of a run that can
    be resumed, and everything of a run that is open or that MLflow does not know. Of deleted runs
    nothing else stays. Models are never touched.
    """
    from tunix_mlflow.tracking.runs import retention

    client, found = _survey(run_id, keep_last, keep_best, metric, mode, keep_every)
    going = [entry for entry in found if entry.kept is None]
    if not as_json:
        for entry in found:
            click.echo(f"{_line(entry)}  {entry.kept or 'goes'}")
    if yes:
        for entry in going:
            retention.remove(client, entry)
    if as_json:
        freed = sum(entry.bytes for entry in going)
        shown = {"freed_bytes": freed, "done": yes, "checkpoints": [_plain(e) for e in found]}
        click.echo(json.dumps(shown))
    elif yes:
        click.echo(f"deleted {len(going)} checkpoints, {_mib(going)}")
    else:
        click.echo(f"would delete {len(going)} checkpoints, {_mib(going)}; --yes does it")


def _survey(
    run_id: str | None, keep_last: int, keep_best: int, metric: str, mode: str, every: int
) -> tuple[Any, list[Entry]]:
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.runs import lookup, retention
    from tunix_mlflow.training.checkpoint import Retention

    if run_id is not None:
        run_id = lookup.look_up(run_id).run_id
    client = store.connect(TrackingConfig())
    policy = Retention(keep_last, keep_best, metric, "min" if mode == "min" else "max", every)
    return client, retention.survey(client, policy, run_id)


def _line(entry: Entry) -> str:
    return f"{entry.run_id}  step {entry.step:>8}  {entry.where:8} {entry.bytes / 2**20:>9.1f} MiB"


def _mib(found: Sequence[Entry]) -> str:
    return f"{sum(entry.bytes for entry in found) / 2**20:,.1f} MiB"


def _plain(entry: Entry) -> dict[str, Any]:
    return entry._asdict() | {"metrics": dict(entry.metrics)}
