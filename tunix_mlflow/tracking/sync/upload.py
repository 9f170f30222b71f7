"""Uploading what is pending of a run that is not open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.record import event_log, folder
from tunix_mlflow.tracking.sync import delivery, lease


def sync(client: MlflowClient, path: Path, report: Callable[[str], None]) -> int:
    """Upload the pending records of a run's folder, and end the run if its process died.

    Args:
        client: reaches MLflow.
        path: the run's folder.
        report: called with what MLflow refuses.

    Returns:
        Bytes that were delivered.

    Raises:
        UnavailableError: if the run is open, here or elsewhere, or MLflow does not answer.
        TrackingError: if it is another server's, or was resumed on another machine since.
    """
    held = folder.lock(path)
    try:
        link = folder.read_link(path)
        here = store.public(mlflow.get_tracking_uri())
        if link is not None and link.tracking_uri != here:
            raise TrackingError(
                f"run {link.run_id} is recorded in {link.tracking_uri}, not in {here}; set"
                " MLFLOW_TRACKING_URI"
            )
        if link is not None:
            owner = lease.holder(client.get_run(link.run_id).data.tags)
            if owner is not None and owner[0] != lease.owner_of(path):
                raise TrackingError(
                    f"run {link.run_id} was resumed on another machine; what is pending here is"
                    " uploaded when it is resumed here"
                )
        delivered = catch_up(client, path, report)
        link = folder.read_link(path)
        if link is not None and event_log.recorded_status(path) is None:
            end_dead(client, link.run_id)
        return delivered
    except MlflowException as error:
        raise UnavailableError(f"run {path.name}: {one_line(error)}") from error
    finally:
        held.release()


def catch_up(client: MlflowClient, path: Path, report: Callable[[str], None]) -> int:
    """Deliver everything that a run's folder holds.

    Returns:
        Bytes that were delivered.

    Raises:
        UnavailableError: when the server goes away meanwhile.
    """
    before = event_log.pending_bytes(path)
    try:
        while delivery.deliver_next(client, path, report):
            pass
    except Exception as error:
        raise UnavailableError(
            f"MLflow did not take all of {path}: {one_line(error)}; nothing is lost, try again"
        ) from error
    return before - event_log.pending_bytes(path)


def end_dead(client: MlflowClient, run_id: str) -> None:
    """Set the status of a run whose process died before it could record one."""
    run = client.get_run(run_id)
    if run.info.status == "RUNNING":
        message = "its process died"
        if tags.is_training_run(run.data.tags):
            message += f"; tunix-mlflow resume {run_id}"
        client.set_tag(run_id, tags.ERROR, message)
        store.end_run(client, run_id, "KILLED")
