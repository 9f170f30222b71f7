"""Uploading what is pending of a run that is not open."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from msgspec.structs import replace

from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.record import event_log, folder
from tunix_mlflow.tracking.record.cursor import (
    pending_bytes,
    read_cursor,
    update_cursor,
)
from tunix_mlflow.tracking.sync import calls, lease
from tunix_mlflow.tracking.sync.delivery import LANES, Away, Delivery

_LEASE_SECONDS = 60


def sync(
    client: MlflowClient,
    path: Path,
    report: Callable[[str], None],
    *,
    skipped_too: bool = False,
) -> int:
    """Upload the pending records of a run's folder, and end the run if its process died.

    What MLflow refused before is offered once more, and the run gets the status that was recorded.

    Args:
        client: reaches MLflow.
        path: the run's folder.
        report: called with what MLflow refuses.
        skipped_too: offer also what :func:`skip` has set aside.

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
            run = client.get_run(link.run_id)
            held_by = lease.holder(run.data.tags)
            if held_by is not None and held_by.owner != lease.owner_of(path):
                raise TrackingError(
                    f"run {link.run_id} was resumed on another machine; what is pending here is"
                    " uploaded when it is resumed here"
                )
            if run.info.status != "RUNNING" and pending_bytes(path):
                # As `mlflow run` leaves it, which does not know of records that are pending.
                client.update_run(link.run_id, status="RUNNING")
        delivered = catch_up(client, path, report)
        _offer_again(client, path, report, skipped_too=skipped_too)
        _settle(client, path)
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
        UnavailableError: when the server goes away meanwhile; other lanes are delivered first.
    """
    before = pending_bytes(path)
    lanes = [Delivery(client, path, lane, report) for lane in LANES]
    away: Away | None = None
    moved = True
    while moved:
        moved = False
        for lane in list(lanes):
            try:
                while lane.deliver_next():
                    moved = True
            except Away as error:
                if error.is_outage or not error.retry_after:
                    away = away or error
                    lanes.remove(lane)
                else:  # perhaps a refusal of the record
                    time.sleep(error.retry_after)
                    moved = True
    if away is not None:
        raise UnavailableError(
            f"MLflow did not take all of {path}: {away}; nothing is lost, try again"
        )
    return before - pending_bytes(path)


def reclaim(client: MlflowClient, path: Path, run_id: str, report: Callable[[str], None]) -> None:
    """Make a run that nobody holds this folder's, when the folder's name for its lease is lost.

    Raises:
        UnavailableError: if another process holds it.
    """
    lease.acquire(client, run_id, path, _LEASE_SECONDS, report).release()


def skip(path: Path) -> int:
    """Set aside what MLflow refuses of a run's folder: :func:`sync` does not offer it again.

    Returns:
        How many records, and points.

    Raises:
        UnavailableError: if the run is open.
    """
    held = folder.lock(path)
    try:
        counts = sum(one.count for one in read_cursor(path).offered)
        update_cursor(
            path,
            lambda cursor: replace(
                cursor, refused=tuple(replace(one, skipped=True) for one in cursor.refused)
            ),
        )
    finally:
        held.release()
    return counts


def describe_refused(path: Path) -> str | None:
    """Return what MLflow refuses of a run, and why, in one line; None for nothing."""
    found = read_cursor(path).offered
    if not found:
        return None
    reasons: dict[str, list[str]] = {}
    for one in found:
        what = f"{one.count} points of {one.what}" if one.lane == "metrics" else one.what
        reasons.setdefault(one.why, []).append(what)
    parts = []
    for why, whats in reasons.items():
        more = f" and {len(whats) - 3} more" if len(whats) > 3 else ""
        parts.append(f"{', '.join(whats[:3])}{more} ({why})")
    return "; ".join(parts)


def end_dead(
    client: MlflowClient, run_id: str, path: Path | None = None, why: str | None = None
) -> str:
    """Set the status of a run that a process left RUNNING.

    That is the one that was recorded, if MLflow has all else; else KILLED, until :func:`sync` has
    delivered the rest.

    Args:
        client: reaches MLflow.
        run_id: the run.
        path: its folder, whose lock the caller holds; None: what was recorded is not asked for.
        why: of what its process may have died, for the tag `tunix_mlflow.error`.

    Returns:
        The status.

    Raises:
        MlflowException: if MLflow refuses or does not answer.
        UnavailableError: the same.
    """
    found, end = client.get_run(run_id).data.tags, None
    held = lease.holder(found)
    # Another's lease: it was resumed on another machine. None: it was recorded without MLflow.
    if path is not None and (held is None or held.owner == lease.owner_of(path)):
        end = event_log.recorded_end(path)
    others = [name for name in LANES if name != "status"]
    if path is not None and end is not None:
        if not any(pending_bytes(path, name) for name in others):
            catch_up(client, path, lambda _: None)  # the status alone
            return end.status
        message = f"its process ended before MLflow had all of it; tunix-mlflow sync {run_id}"
    else:
        message = f"its process died{f', {why}' if why else ''}"
        if tags.is_training_run(found):
            message += f"; tunix-mlflow resume {run_id}"
    client.set_tag(run_id, tags.ERROR, message)
    store.end_run(client, run_id, "KILLED")
    return "KILLED"


def _offer_again(
    client: MlflowClient, path: Path, report: Callable[[str], None], *, skipped_too: bool
) -> None:
    """Offer what MLflow refused once more."""
    at = read_cursor(path)
    for one in at.refused if skipped_too else at.offered:
        try:
            Delivery(client, path, one.lane, report).retry_refused(one)
        except Away as error:
            raise UnavailableError(f"MLflow did not take all of {path}: {error}") from error


def _settle(client: MlflowClient, path: Path) -> None:
    """Give a run its recorded status, and the tag that counts what MLflow refuses."""
    link = folder.read_link(path)
    if link is None or pending_bytes(path):
        return
    calls.mark_incomplete(client, path, link.run_id)
    end = event_log.recorded_end(path)
    run = client.get_run(link.run_id)
    if end is None and run.info.status == "RUNNING":
        end_dead(client, link.run_id)
    elif end is not None:
        if run.info.status != end.status:
            store.end_run(client, link.run_id, end.status, end.end_time)
        if tags.ERROR in run.data.tags and tags.ERROR not in event_log.recorded_tags(path):
            client.delete_tag(link.run_id, tags.ERROR)  # of another command, which found it dead
