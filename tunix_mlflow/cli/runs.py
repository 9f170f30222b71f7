"""`tunix-mlflow runs` and `sync`: training runs, their proof, and what MLflow lacks of them."""

from __future__ import annotations

import json
from typing import Any

import click

from tunix_mlflow.errors import Refused, TrackingError

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def runs() -> None:
    """Look at training runs, and prove them."""


@runs.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, help="The newest so many.")
@_json
def list_(limit: int, as_json: bool) -> None:
    """Training runs of all experiments, the newest first.

    Runs that `mlflow run` made only to go on with another are left out.
    """
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.runs import lookup as operations

    client = store.connect(TrackingConfig())
    found = [_row(run) for run in operations.training_runs(client, limit)]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo("no training runs yet; `tunix-mlflow train` makes one")
    for row in found:
        loss = "" if row["final_loss"] is None else f"loss {row['final_loss']:.4f}"
        click.echo(
            f"{row['run_id']}  {row['status']:9} {row['dataset'] or '':24}"
            f" {row['steps'] or 0:>7} steps  {loss}"
        )


@runs.command()
@click.argument("run_id")
@_json
def verify(run_id: str, as_json: bool) -> None:
    """Train a run's last segment again, and compare state and losses to the bit.

    The verdict is on the run as the tag tunix_mlflow.verified. Exit code 3 when something differs.
    """
    from tunix_mlflow.data import datasets
    from tunix_mlflow.runtime.environment import prepare
    from tunix_mlflow.tracking.runs import lookup as operations

    found = operations.look_up(run_id)
    prepare(found.config, found.environment)
    if found.config.dataset is None:
        raise TrackingError(f"run {found.run_id} names no dataset")
    from tunix_mlflow.tracking.runs import replay

    def say(message: str) -> None:
        click.echo(message, err=True)

    manifest = datasets.ready(found.config.dataset, say)
    verdict = replay.verify(found.client, found.run_id, found.config, manifest, say)
    if found.client is not None:
        found.client.set_tag(found.run_id, replay.VERDICT_TAG, verdict.summary()[:5000])
    if as_json:
        click.echo(json.dumps(verdict._asdict() | {"run_id": found.run_id, "ok": verdict.ok}))
    if not verdict.ok:
        raise Refused(f"run {found.run_id} {verdict.summary()}")
    if not as_json:
        click.echo(f"run {found.run_id} {verdict.summary()}")


def sync(run_id: str | None) -> None:
    """Tell MLflow what it does not have yet.

    Raises:
        TrackingError: if there is no such run here, or MLflow does not answer.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.record import event_log
    from tunix_mlflow.tracking.runs import lookup as operations

    folders = operations.folders()
    if run_id is not None:
        one = paths.run_dir(run_id) if run_id.isalnum() else None
        if one is None or not (one / event_log.EVENT_LOG).exists():
            raise TrackingError(f"there is no run {run_id[:80]!r} in {paths.run_dir('')}")
        folders = [one.resolve()]
    client = store.connect(TrackingConfig())
    failed = []
    for folder in reversed(folders):  # parents before their children
        if not (folder / event_log.EVENT_LOG).exists():
            continue
        if run_id is None and not event_log.waiting(folder):
            continue
        try:
            told = operations.sync(client, folder, lambda message: click.echo(message, err=True))
        except TrackingError as error:
            failed.append(str(error))
            continue
        known = event_log.known(folder)
        if known is not None:
            link = store.run_link(known.experiment_id, known.run_id)
            click.echo(f"run {known.run_id}: {told:,} bytes of records delivered; {link}")
    if failed:
        raise TrackingError("; ".join(failed))


def _row(run: Any) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "dataset": tags.get("tunix_mlflow.dataset"),
        "steps": int(metrics["total_steps"]) if "total_steps" in metrics else None,
        "final_loss": metrics.get("final_loss"),
        "exact_match": metrics.get("eval/exact_match"),
        "verified": tags.get("tunix_mlflow.verified"),
        "key": tags.get("tunix_mlflow.key"),
    }
