"""`tunix-mlflow runs` and `sync`: training runs, their reproduction, and pending records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.errors import Refused, TrackingError, UnavailableError

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def runs() -> None:
    """List training runs, and check that they are reproducible."""


@runs.command("list")
@click.option("--limit", type=Number(1), default=20, show_default=True, help="At most.")
@_json
def list_(limit: int, as_json: bool) -> None:
    """List the training runs of all experiments, the newest first.

    Runs that `mlflow run` created only to resume another one are left out.
    """
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.runs import lookup

    client = store.connect(TrackingConfig())
    rows = [_row(run) for run in lookup.training_runs(client, limit)]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("no training runs yet; `tunix-mlflow train` makes one")
    else:
        columns = ("run_id", "status", "dataset", "steps", "final_loss", "exact_match")
        headers = ("RUN", "STATUS", "DATASET", "STEPS", "LOSS", "EXACT MATCH")
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
    from tunix_mlflow.tracking.runs import replay

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


@click.command()
@click.argument("run_id", required=False)
def sync(run_id: str | None) -> None:
    """Upload pending records to MLflow: of one run, or of all runs on this machine."""
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.record.folder import read_link
    from tunix_mlflow.tracking.sync import upload

    paths = _pending(run_id)
    client = store.connect(TrackingConfig())
    failed: list[TrackingError | UnavailableError] = []
    for path in paths:
        try:
            sent = upload.sync(client, path, lambda message: click.echo(message, err=True))
        except (TrackingError, UnavailableError) as error:
            failed.append(error)
            continue
        link = read_link(path)
        if link is not None:
            url = store.run_link(link.experiment_id, link.run_id)
            click.echo(f"run {link.run_id}: uploaded {sent:,} bytes of records; {url}")
    if failed:
        raise type(failed[0])("; ".join(map(str, failed)))


def _pending(run_id: str | None) -> list[Path]:
    """Return the folder of a run, or the folders that have pending records, parents first.

    Raises:
        TrackingError: if there is no such run here.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.tracking.record.event_log import pending_bytes
    from tunix_mlflow.tracking.record.folder import EVENT_LOG
    from tunix_mlflow.tracking.runs import lookup

    if run_id is None:
        folders = [path for path in reversed(lookup.folders()) if (path / EVENT_LOG).exists()]
        return [path for path in folders if pending_bytes(path)]
    folder = paths.run_dir(run_id) if run_id.isalnum() else None
    if folder is None or not (folder / EVENT_LOG).exists():
        raise TrackingError(f"there is no run {run_id[:80]!r} in {paths.run_dir('')}")
    return [folder.resolve()]


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
    }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
