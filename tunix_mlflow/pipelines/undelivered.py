"""What this machine has of a run and MLflow has not: delivered before it is asked for, or named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.record import folder, records
from tunix_mlflow.tracking.record.cursor import pending_bytes, read_cursor
from tunix_mlflow.tracking.record.event_log import read_records, recorded_tags
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.sync import upload

_USES = ("evaluate", "promote")
"""Stages whose runs say something of a model."""


def deliver(client: MlflowClient, reference: str, report: Callable[[str], None]) -> None:
    """Deliver what is pending of a run, and of the runs that evaluated or promoted a model.

    Args:
        client: reaches MLflow.
        reference: a run id, or another name of a model.
        report: called with what cannot be delivered, and why.
    """
    named = _folder(reference)
    for path in _waiting():
        used = path == named or recorded_tags(path).get(tags.STAGE) in _USES
        if not used or folder.is_open(path):
            continue
        try:
            upload.sync(client, path, report)
        except (TrackingError, UnavailableError) as error:
            report(f"run {path.name} is not in MLflow as it was recorded: {error}")


def is_incomplete(run_id: str) -> bool:
    """Return whether this machine has something of a run that MLflow does not have."""
    path = lookup.folder_of(run_id)
    return path is not None and bool(pending_bytes(path) or read_cursor(path).offered)


def complete(client: MlflowClient | None, run_id: str, report: Callable[[str], None]) -> None:
    """Deliver what is missing of a run that has finished.

    Args:
        client: reaches MLflow; None: it is away, and nothing is delivered.
        run_id: the run.
        report: called with what MLflow refuses.

    Raises:
        UnavailableError: if it still refuses a part, or does not answer.
        TrackingError: if the folder is another server's.
    """
    path = lookup.folder_of(run_id)
    if client is None or path is None or not is_incomplete(run_id):
        return
    upload.sync(client, path, report)
    if refused := upload.describe_refused(path):
        raise UnavailableError(f"MLflow refuses a part of run {run_id}: {refused}")
    report(f"run {run_id}: MLflow has all of it now")


def check_model(reference: str) -> None:
    """Check that a run's model does not wait for MLflow.

    Raises:
        UnavailableError: if this machine has a model of the run that MLflow does not have.
    """
    path = _folder(reference)
    if path is None:
        return
    logged = [end for end, record in read_records(path) if isinstance(record, records.Model)]
    if not logged:
        return
    at = read_cursor(path)
    refused = [one.why for one in at.refused if one.lane == "models"]
    if refused or at.models < logged[-1]:
        why = f"MLflow refuses it: {refused[-1]}" if refused else "MLflow does not have it yet"
        raise UnavailableError(
            f"run {reference} logged its model, and {why}; tunix-mlflow sync {path.name} delivers"
            " it"
        )


def check_evaluations(model_id: str) -> None:
    """Check that no figure of a model waits for MLflow.

    Raises:
        UnavailableError: if this machine has an evaluation of it that MLflow does not have.
    """
    for path in _waiting():
        used = {r.model_id for _, r in read_records(path) if isinstance(r, records.ModelInput)}
        waits = pending_bytes(path) or any(o.lane == "metrics" for o in read_cursor(path).refused)
        if waits and model_id in used and recorded_tags(path).get(tags.STAGE) == "evaluate":
            raise UnavailableError(
                f"run {path.name} evaluated model {model_id}, and MLflow does not have its figures;"
                f" tunix-mlflow sync {path.name} delivers them"
            )


def _waiting() -> Iterator[Path]:
    """The folders of this store with something that MLflow does not have; no log is read."""
    for path in lookup.folders():
        if (pending_bytes(path) or read_cursor(path).refused) and lookup.is_of_this_store(path):
            yield path


def _folder(reference: str) -> Path | None:
    """The folder of a run on this machine; None for another name of a model."""
    return lookup.folder_of(reference.removeprefix("runs:/").partition("/")[0])
