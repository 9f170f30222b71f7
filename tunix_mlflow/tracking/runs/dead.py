"""Runs that their processes left behind: they get a status, and what was half done is removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime import memory
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record import marker
from tunix_mlflow.tracking.record.event_log import read_records
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, EVENT_LOG, MODELS, PACKAGES, STAGED
from tunix_mlflow.tracking.record.marker import About
from tunix_mlflow.tracking.sync import lease, logged_model, upload


def mark(client: MlflowClient, report: Callable[[str], None]) -> None:
    """End the runs that dead processes of this machine left RUNNING, and tidy up after them.

    There is nothing to do, and nothing is asked of MLflow, unless a process died. What fails is
    tried again by the next command.

    Args:
        client: reaches MLflow.
        report: receives a line for each run.
    """
    here = store.public(mlflow.get_tracking_uri())
    for held, about in marker.abandoned():
        try:
            if about is not None:
                if not _is_due(about, here):
                    continue
                why = memory.killed_since(about.oom_kills)
                for run_id, status in _end(client, held.owner, about, why):
                    report(describe(run_id, status, why))
        except UnavailableError:
            continue  # it is open in another process
        except (MlflowException, TrackingError, OSError) as error:
            report(f"a run whose process died was not ended: {one_line(error)}")
            continue
        held.release(remove=True)


def describe(run_id: str, status: str, why: str | None = None) -> str:
    """Return a line on a run that was ended."""
    died = f" ({why})" if why and status == "KILLED" else ""
    return f"run {run_id} was left RUNNING by a process that is gone{died}; it is {status} now"


def end(client: MlflowClient, run: Run, folder: Path, why: str | None = None) -> str | None:
    """End a run whose process is gone, and delete what that was writing or deleting.

    Args:
        client: reaches MLflow.
        run: MLflow's.
        folder: its folder, which need not exist.
        why: of what its process may have died.

    Returns:
        Its status now; None if it was not RUNNING.

    Raises:
        UnavailableError: if it is open in another process, or MLflow does not answer.
        MlflowException: if MLflow refuses or does not answer.
    """
    run_id, status = run.info.run_id, None
    lock = folders.lock(folder)
    try:
        if run.info.status == "RUNNING":
            status = upload.end_dead(client, run_id, folder.resolve(), why)
        logged_model.delete_pending(client, run.info.experiment_id, run_id)
        for path in leftovers(folder.resolve()):
            files.remove(path)
    finally:
        lock.release()
    if not (folder / EVENT_LOG).exists():  # nothing was recorded
        shutil.rmtree(folder, ignore_errors=True)
    return status


def leftovers(folder: Path) -> list[Path]:
    """Return what a dead process was writing or deleting in a run's folder."""
    # Only here, since both load jax, which a run does not need to begin.
    from tunix_mlflow.models import arrays
    from tunix_mlflow.training import checkpoint

    found = files.leftovers(folder) + checkpoint.leftovers(folder / CHECKPOINTS)
    models = folder / MODELS
    found += [
        bundle
        for bundle in (sorted(models.iterdir()) if models.is_dir() else ())
        if not (bundle / arrays.MANIFEST).exists()
    ]
    if (folder / PACKAGES).is_dir():
        found.append(folder / PACKAGES)  # copies, made anew by the next delivery
    staged = folder / STAGED
    if staged.is_dir():
        named = {str(getattr(record, "path", "")) for _, record in read_records(folder)}
        used = {path.split("/")[1] for path in named if path.startswith(f"{STAGED}/")}
        found += [path for path in sorted(staged.iterdir()) if path.name not in used]
    return found


def _is_due(about: About, here: str) -> bool:
    """Whether the runs of a marker can be ended: not before this server has them."""
    if about.folder is None:
        return about.tracking_uri == here
    folder = paths.run_dir(about.folder)
    link = folders.read_link(folder)
    return not folder.exists() if link is None else link.tracking_uri == here


def _end(client: MlflowClient, owner: str, about: About, why: str | None) -> list[tuple[str, str]]:
    """End the runs of a marker that are RUNNING; return their ids and what they are now."""
    ended = []
    for run in _runs(client, owner, about):
        run_id = run.info.run_id
        held = lease.holder(run.data.tags)
        if held is not None and held.owner != owner:
            continue  # it was resumed elsewhere
        if run.info.lifecycle_stage == "deleted":
            continue
        status = end(client, run, paths.run_dir(about.folder or run_id), why)
        if status is not None:
            ended.append((run_id, status))
    return ended


def _runs(client: MlflowClient, owner: str, about: About) -> list[Run]:
    """The runs that the process of a marker made or continued; two if an answer was lost."""
    if about.folder is not None:
        link = folders.read_link(paths.run_dir(about.folder))
        try:
            return [] if link is None else [client.get_run(link.run_id)]
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return []  # somebody deleted it for good
    if about.experiment_id is None:
        return []
    return list(client.search_runs([about.experiment_id], f"tags.`{tags.LEASE}` LIKE '{owner} %'"))
