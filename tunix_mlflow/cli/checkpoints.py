"""`tunix-mlflow checkpoints`: list, check and prune checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.errors import IntegrityError

if TYPE_CHECKING:
    from tunix_mlflow.pipelines.retention import Entry

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_run = click.option("--run", "run_id", metavar="RUN_ID", help="Only those of this run.")


@click.group()
def checkpoints() -> None:
    """List, check and prune the checkpoints of all runs, here and in the artifact store."""


@checkpoints.command("list")
@_run
@_json
def list_(run_id: str | None, as_json: bool) -> None:
    """List every checkpoint, where it is and its size."""
    from tunix_mlflow.cli.terminal import print_json

    _, entries = _survey(run_id, 1, 0, "validation/loss", "min", 0)
    if as_json:
        print_json([_plain(entry) for entry in entries])
        return
    _echo(entries)
    click.echo(f"{len(entries)} checkpoints, {_mib(entries)}")


@checkpoints.command()
@_run
@_json
def verify(run_id: str | None, as_json: bool) -> None:
    """Check every file of every checkpoint; exit code 3 if one is damaged."""
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.pipelines import retention

    client, entries = _survey(run_id, 1, 0, "validation/loss", "min", 0)
    reasons = [retention.damage(client, entry) for entry in entries]
    damaged = [
        _plain(entry) | {"damage": reason}
        for entry, reason in zip(entries, reasons, strict=True)
        if reason is not None
    ]
    if as_json:
        print_json({"checked": len(entries), "damaged": damaged})
    else:
        _echo(entries, ("FILES", [reason or "intact" for reason in reasons]))
    if damaged:
        raise IntegrityError(f"{len(damaged)} of {len(entries)} checkpoints are damaged")


@checkpoints.command()
@click.option(
    "--keep-last",
    type=Number(1),
    default=1,
    show_default=True,
    help="Newest to keep.",
)
@click.option(
    "--keep-best",
    type=Number(0),
    default=0,
    show_default=True,
    help="Best to keep.",
)
@click.option("--metric", default="validation/loss", show_default=True, help="For --keep-best.")
@click.option(
    "--mode",
    type=click.Choice(["min", "max"]),
    default="min",
    show_default=True,
    help="Whether a smaller or a larger --metric is better.",
)
@click.option(
    "--keep-every",
    type=Number(0),
    default=0,
    help="Keep multiples of N steps.",
)
@_run
@click.option("--yes", is_flag=True, help="Delete; without it, only show what would be deleted.")
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

    Always kept: what a registered version was made from, the two newest of a run that can be
    resumed, and everything of a run that is open or that MLflow does not know. Of deleted runs
    nothing else is kept. Models are never deleted.
    """
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.pipelines import retention

    client, entries = _survey(run_id, keep_last, keep_best, metric, mode, keep_every)
    to_delete = [entry for entry in entries if entry.kept is None]
    if not as_json:
        _echo(entries, ("KEPT", [entry.kept or "no: delete" for entry in entries]))
    if yes:
        for entry in to_delete:
            retention.remove(client, entry)
    if as_json:
        freed = sum(entry.bytes for entry in to_delete)
        print_json({"freed_bytes": freed, "done": yes, "checkpoints": [_plain(e) for e in entries]})
    elif yes:
        click.echo(f"deleted {len(to_delete)} checkpoints, {_mib(to_delete)}")
    else:
        click.echo(
            f"would delete {len(to_delete)} checkpoints, {_mib(to_delete)}; add --yes to do it"
        )


def _survey(
    run_id: str | None, keep_last: int, keep_best: int, metric: str, mode: str, every: int
) -> tuple[Any, list[Entry]]:
    from tunix_mlflow.cli.terminal import Terminal
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.pipelines import retention
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.runs import dead, lookup
    from tunix_mlflow.training.checkpoint import Retention

    if run_id is not None:
        run_id = lookup.look_up(run_id, Terminal().info).run_id
    client = store.connect(TrackingConfig())
    dead.mark(client, Terminal().info)
    policy = Retention(keep_last, keep_best, metric, "min" if mode == "min" else "max", every)
    return client, retention.survey(client, policy, run_id)


def _echo(entries: Sequence[Entry], *columns: tuple[str, Sequence[str]]) -> None:
    from tunix_mlflow.cli import table

    headers = ("RUN", "STEP", "WHERE", "MIB", *(header for header, _ in columns))
    rows = [
        (e.run_id, e.step, e.where, round(e.bytes / 2**20, 1), *(c[i] for _, c in columns))
        for i, e in enumerate(entries)
    ]
    if rows:
        table.echo(headers, rows)


def _mib(entries: Sequence[Entry]) -> str:
    return f"{sum(entry.bytes for entry in entries) / 2**20:,.1f} MiB"


def _plain(entry: Entry) -> dict[str, Any]:
    return entry._asdict() | {"metrics": dict(entry.metrics)}
