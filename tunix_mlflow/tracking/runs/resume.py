"""Continuing a run: whether it may be, and what this machine needs for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.config.identity import differences
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import CheckpointError, IntegrityError, TrackingError
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record import metrics_log
from tunix_mlflow.tracking.record.cursor import rewind_metrics, update_cursor
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, METRICS_LOG
from tunix_mlflow.tracking.runs.lookup import RecordedRun, history, look_up
from tunix_mlflow.tracking.sync import lease, upload


def to_resume(
    run_id: str,
    report: Callable[[str], None],
    change: Callable[[Config], Config] = lambda before: before,
    *,
    fork: bool = False,
) -> RecordedRun:
    """Return configuration and environment of a training run that can be resumed.

    Args:
        run_id: MLflow's, or the name of a folder that MLflow does not have.
        report: called with what MLflow refuses of a run that is uploaded first.
        change: from the run's configuration to the one to resume with; what may change is told
            by `config.identity.FREE`.
        fork: a new run will begin at a checkpoint of this one; then anything may change.

    Raises:
        UnavailableError: if MLflow is away and the run is not on this machine.
        TrackingError: if there is no such run, it is no training run, it has finished, or what
            may not change would.
    """
    found = look_up(run_id, report)
    config = change(found.config)
    if is_done(found, config) and not fork:
        raise TrackingError(
            f"run {found.run_id} has finished; there is nothing to resume. Continue it with more"
            f" steps: training.steps={2 * found.config.training.steps}"
        )
    if not fork:
        check_changes(found, config)
    return found._replace(config=config)


def check_changes(run: RecordedRun, config: Config) -> None:
    """Check that a run can be resumed with another configuration.

    Raises:
        TrackingError: if it changes what may not change.
    """
    if changed := differences(run.config, config):
        raise TrackingError(
            f"run {run.run_id} cannot be resumed with {'; '.join(changed)}; leave it as it was,"
            " or start a new run from its checkpoint with --fork"
        )


def is_done(run: RecordedRun, config: Config) -> bool:
    """Return whether a run has finished, and `config` asks for no more steps."""
    return run.status == "FINISHED" and config.training.steps <= run.config.training.steps


def need_checkpoint(run: RecordedRun, step: int | None, report: Callable[[str], None]) -> None:
    """Make sure that a run's checkpoint is on this machine: of a step, or the newest.

    Raises:
        CheckpointError: if there is none, here or in MLflow.
    """
    from tunix_mlflow.training import checkpoint

    folder = paths.run_dir(run.run_id)
    if run.client is not None:
        fetch_checkpoint(run.client, run.run_id, folder, report, step)
    have = [int(path.name) for path in checkpoint.sealed_checkpoints(folder / CHECKPOINTS)]
    if not have or (step is not None and step not in have):
        listed = ", ".join(map(str, have)) or "none"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"run {run.run_id} has {what}; there are: {listed}")


def fetch_checkpoint(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    report: Callable[[str], None],
    wanted: int | None = None,
) -> None:
    """Download an uploaded checkpoint, unless it is on this machine.

    Args:
        client: reaches MLflow.
        run_id: the run.
        folder: its folder on this machine.
        report: called with what was fetched, and with what is damaged.
        wanted: the step; None: the newest, unless a newer one is here.
    """
    from tunix_mlflow.models import arrays
    from tunix_mlflow.training import checkpoint

    checkpoints = folder / CHECKPOINTS
    have = {int(path.name) for path in checkpoint.sealed_checkpoints(checkpoints)}
    if wanted in have:
        return
    for step, artifact in sorted(uploaded_steps(client, run_id).items(), reverse=True):
        if wanted is None and step <= max(have, default=-1):
            return
        if wanted not in (None, step):
            continue
        checkpoints.mkdir(parents=True, exist_ok=True)
        with files.scratch(folder) as scratch:
            fetched = download_artifact(client, run_id, artifact, scratch)
            try:
                arrays.check(fetched)
            except IntegrityError as error:
                report(f"the uploaded checkpoint of step {step} is damaged ({error}); not used")
                continue
            final = checkpoints / fetched.name
            if final.exists():
                shutil.rmtree(final)  # one that was never sealed
            fetched.rename(final)
        report(f"run {run_id}: fetched the checkpoint of step {step} from MLflow")
        return


def uploaded_steps(client: MlflowClient, run_id: str) -> dict[int, str]:
    """Return step -> artifact path of each checkpoint that was uploaded completely."""
    found = {}
    for entry in store.list_artifacts(client, run_id, CHECKPOINTS):
        name = Path(entry.path).name
        if entry.is_dir and name.isdigit():
            inside = {
                Path(file.path).name for file in store.list_artifacts(client, run_id, entry.path)
            }
            if "manifest.json" in inside:  # which goes last
                found[int(name)] = entry.path
    return found


def refill(client: MlflowClient, run_id: str, folder: Path, report: Callable[[str], None]) -> None:
    """Complete a run's folder by what MLflow has: the run may have been resumed elsewhere.

    Metrics come with MLflow's own timestamps, so that delivering them again doubles nothing.

    Raises:
        MlflowException: if MLflow does not answer.
    """
    path = folder / METRICS_LOG
    with files.scratch(folder) as scratch:
        points = []
        if METRICS_LOG in {found.path for found in store.list_artifacts(client, run_id)}:
            uploaded = download_artifact(client, run_id, METRICS_LOG, scratch)
            if path.exists():
                lines = metrics_log.read(uploaded)
                points = [point for line in lines for point in metrics_log.points(line)]
            else:
                uploaded.replace(path)
        points += history(client, run_id)
        update_cursor(folder, rewind_metrics)
        if metrics_log.merge(path, points):
            report(f"run {run_id}: its history was completed from MLflow")
    fetch_checkpoint(client, run_id, folder, report)


def mark_stale(client: MlflowClient, experiment_id: str) -> list[tuple[str, str]]:
    """End runs of an experiment that a process, anywhere, left RUNNING, and whose lease is over.

    Returns:
        Their ids, and the status of each.
    """
    found = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    stale = [
        run.info.run_id
        for run in found
        if lease.holder(run.data.tags) is not None and lease.expired(run.data.tags)
    ]
    # Not one that another process resumed meanwhile.
    dead = [one for one in stale if lease.expired(client.get_run(one).data.tags)]
    return [(run_id, upload.end_dead(client, run_id)) for run_id in dead]
