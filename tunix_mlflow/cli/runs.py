"""`tunix-mlflow runs` and `sync`: training runs, their reproduction, and pending records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.errors import InputError, Refused, TrackingError, UnavailableError

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def runs() -> None:
    """List training runs, repair them, and check that they are reproducible."""


@runs.command("list")
@click.option("--limit", type=Number(1), default=20, show_default=True, help="At most.")
@_json
def list_(limit: int, as_json: bool) -> None:
    """List the training runs of all experiments, the newest first.

    Runs that `mlflow run` created only to resume another one are left out.
    """
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.runs import dead, lookup

    client = store.connect(TrackingConfig())
    dead.mark(client, Terminal().info)
    rows = [_row(run) for run in lookup.training_runs(client, limit)]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("no training runs yet; `tunix-mlflow train` makes one")
    else:
        columns = ("run_id", "status", "dataset", "steps", "final_loss", "exact_match", "missing")
        headers = ("RUN", "STATUS", "DATASET", "STEPS", "LOSS", "EXACT MATCH", "MISSING")
        table.echo(headers, [[_rounded(row[name]) for name in columns] for row in rows])


@runs.command()
@click.argument("run_id")
@_json
def verify(run_id: str, as_json: bool) -> None:
    """Train the last segment of a run again, and compare state and losses bit for bit.

    The result is logged as the run's tag tunix_mlflow.verified. Exit code 3 if something differs.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.data import datasets
    from tunix_mlflow.runtime.environment import export
    from tunix_mlflow.tracking.runs import lookup

    run = lookup.look_up(run_id, Terminal().info)
    export(run.config, run.environment)
    if run.config.dataset is None:
        raise TrackingError(f"run {run.run_id} names no dataset")
    from tunix_mlflow.pipelines import replay

    with Terminal() as reporter:
        manifest = datasets.ready(run.config.dataset, reporter.info)
        result = replay.verify(run.client, run.run_id, run.config, manifest, reporter.info)
    if run.client is not None:
        run.client.set_tag(run.run_id, replay.VERDICT_TAG, result.summary()[:5000])
    if as_json:
        print_json(result._asdict() | {"run_id": run.run_id, "ok": result.ok})
    if not result.ok:
        raise Refused(f"run {run.run_id} {result.summary()}")
    if not as_json:
        click.echo(f"run {run.run_id} {result.summary()}")


@runs.command()
@click.argument("run_id")
@_json
def repair(run_id: str, as_json: bool) -> None:
    """Repair a run's folder from MLflow, and MLflow from the folder.

    Lines that cannot be read are put aside, files are fetched, everything is delivered again, and
    the run gets its status. Exit code 4 if something remains.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.pipelines import repair as pipeline

    with Terminal() as reporter:
        result = pipeline.repair(run_id, reporter=reporter)
    if as_json:
        print_json(result._asdict())
    if result.remaining:
        raise UnavailableError(f"run {result.run_id}: {'; '.join(result.remaining)}")
    if not as_json:
        found = f"{len(result.repaired)} repairs" if result.repaired else "nothing was damaged"
        click.echo(f"run {result.run_id}: {found}; MLflow has all of it")


@click.command()
@click.argument("run_id", required=False)
@click.option("--skip", is_flag=True, help="Do not offer again what MLflow refuses.")
@click.option("--retry-refused", is_flag=True, help="Offer also what --skip has set aside.")
def sync(run_id: str | None, skip: bool, retry_refused: bool) -> None:
    """Upload pending records to MLflow: of one run, or of all runs on this machine.

    What MLflow refused before is offered once more. A run that is complete gets its status, and
    loses the tag tunix_mlflow.incomplete. Exit code 4 if something is still missing.
    """
    if skip and retry_refused:
        raise InputError("give --skip or --retry-refused, not both")
    from tunix_mlflow.cli.terminal import Terminal
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.record.folder import is_open, read_link
    from tunix_mlflow.tracking.runs import dead
    from tunix_mlflow.tracking.sync import upload

    paths = _pending(run_id, skipped_too=retry_refused)
    client = store.connect(TrackingConfig())
    failed: list[TrackingError | UnavailableError] = []
    for path in paths:
        if run_id is None and is_open(path):
            click.echo(f"run {path.name} is open: its own process uploads its records", err=True)
            continue
        try:
            if skip:
                count = upload.skip(path)
                click.echo(f"run {path.name}: {count:,} refused records are not offered again")
            sent = upload.sync(
                client,
                path,
                Terminal().info,
                skipped_too=retry_refused,
            )
        except (TrackingError, UnavailableError) as error:
            failed.append(error)
            continue
        refused = upload.describe_refused(path)
        if refused is not None:
            failed.append(UnavailableError(f"MLflow refuses a part of run {path.name}: {refused}"))
        link = read_link(path)
        if link is not None:
            url = store.run_link(link.experiment_id, link.run_id)
            click.echo(f"run {link.run_id}: uploaded {sent:,} bytes of records; {url}")
    dead.mark(client, Terminal().info)
    if failed:
        raise type(failed[0])("; ".join(map(str, failed)))


def _pending(run_id: str | None, *, skipped_too: bool) -> list[Path]:
    """Return the folder of a run, or those with records that MLflow has not, parents first.

    Args:
        run_id: None: all runs on this machine.
        skipped_too: also those of which all that is refused was set aside.

    Raises:
        TrackingError: if there is no such run here.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.tracking.record.cursor import pending_bytes, read_cursor
    from tunix_mlflow.tracking.record.folder import EVENT_LOG
    from tunix_mlflow.tracking.runs import lookup

    if run_id is None:
        folders = [path for path in reversed(lookup.folders()) if (path / EVENT_LOG).exists()]
        return [
            path
            for path in folders
            if pending_bytes(path)
            or read_cursor(path).offered
            or (skipped_too and read_cursor(path).refused)
        ]
    folder = lookup.folder_of(run_id)
    if folder is None or not (folder / EVENT_LOG).exists():
        raise TrackingError(f"there is no run {run_id[:80]!r} in {paths.run_dir('')}")
    return [folder]


def _row(run: Any) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "dataset": tags.get("tunix_mlflow.dataset"),
        "steps": int(metrics["total_steps"]) if "total_steps" in metrics else None,
        "final_loss": metrics.get("final_loss"),
        "exact_match": metrics.get("eval/exact_match", metrics.get("validation/exact_match")),
        "verified": tags.get("tunix_mlflow.verified"),
        "key": tags.get("tunix_mlflow.key"),
        "missing": _missing(run.info.run_id) or tags.get("tunix_mlflow.incomplete"),
    }


def _missing(run_id: str) -> str | None:
    """Return what MLflow does not have of a run that is not open, as far as this machine knows."""
    from tunix_mlflow import paths
    from tunix_mlflow.tracking.record.cursor import pending_bytes
    from tunix_mlflow.tracking.record.folder import is_open

    path = paths.run_dir(run_id)
    if not path.exists() or not pending_bytes(path) or is_open(path):
        return None
    return "not delivered yet"


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
