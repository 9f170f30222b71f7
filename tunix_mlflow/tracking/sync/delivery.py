"""From a run's folder to MLflow, lane by lane: what is next, what is retried, what is passed over.

Each lane delivers its own kind of records in order, and waits for no other; only the status waits
for all, since FINISHED says that everything is there. A call that fails says one of three things:
MLflow is away, and the same record is tried again; it refuses the user, which is the same but said
as such; or it refuses this record, which is passed over, counted in cursor.json, and offered again
by `tunix-mlflow sync`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from mlflow.tracking import MlflowClient
from msgspec.structs import replace

from tunix_mlflow.tracking import tags as names
from tunix_mlflow.tracking.record import cursor as cursors
from tunix_mlflow.tracking.record import records
from tunix_mlflow.tracking.record.cursor import Refused
from tunix_mlflow.tracking.record.folder import EVENT_LOG, METRICS_LOG, read_link
from tunix_mlflow.tracking.record.records import RECORD_LANES, Lane, Record
from tunix_mlflow.tracking.sync import calls, logged_model, metrics
from tunix_mlflow.tracking.sync.answers import Answer, understand

LANES: tuple[Lane, ...] = ("fields", "metrics", "artifacts", "models", "status")
_RETRY_SECONDS = 0.3  # of what may be a refusal
_NOT_FOUND = 404


class Away(Exception):
    """MLflow did not take a record now; the same is tried again later.

    Args:
        why: in one line.
        is_outage: no answer, or none that is MLflow's; else `why` says all that is known.
        retry_after: seconds; 0: as the caller thinks fit.
    """

    def __init__(self, why: str, *, is_outage: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.is_outage, self.retry_after = is_outage, retry_after


class _Next(NamedTuple):
    record: Record | records.Unreadable | None  # None: no more of this lane
    start: int  # of its line
    end: int


class Delivery:
    """Delivers one lane of one run. One thread at a time calls it.

    Args:
        client: reaches MLflow.
        folder: the run's.
        lane: which records.
        report: receives one-line messages.
    """

    def __init__(
        self, client: MlflowClient, folder: Path, lane: Lane, report: Callable[[str], None]
    ) -> None:
        self._client, self.folder, self.lane, self._report = client, folder, lane, report
        self._tries: tuple[int, int] = (0, 0)  # byte of a record, and how often it failed
        self._refused_before: set[str] = set()  # reasons that the user was told
        self._offered: list[Refused] = []  # before a status

    def deliver_next(self) -> bool:
        """Deliver the lane's next record, or its next batch of metrics, and move the cursor.

        Returns:
            False when there was nothing that can be delivered now.

        Raises:
            Away: when MLflow did not take it, and may later.
        """
        link = read_link(self.folder)
        if link is None and self.lane != "fields":
            return False  # there is no run to deliver to
        if self.lane == "metrics":
            return self._deliver_metrics()
        at = cursors.read_cursor(self.folder).at(self.lane)
        found = _next(self.folder / EVENT_LOG, at, self.lane)
        if found.record is None:
            if found.end > at:
                cursors.advance(self.folder, self.lane, found.end)
            return False
        if isinstance(found.record, records.Unreadable):
            what = f"a record of {EVENT_LOG} at byte {found.start}"
            refused = Refused(self.lane, found.start, what, str(found.record))
            self._pass_over(found.start, found.end, refused)
            return True
        if isinstance(found.record, records.Status):
            if not self._others_done(found.start):
                return False
            self._offer_failures_again()
        try:
            calls.deliver(self._client, self.folder, found.record, self._report)
        except Exception as error:
            if _still_due(self.folder, found) is not None:
                answer = understand(error)
                self._check(answer, found)
                what, may_pass = records.describe(found.record), answer.may_pass
                refused = Refused(self.lane, found.start, what, answer.why, may_pass=may_pass)
                self._pass_over(found.start, found.end, refused)
                self._abandon(found.record)
                return True
            calls.delete_staged(self.folder, found.record)
        cursors.advance(self.folder, self.lane, found.end, start=found.start)
        return True

    def _abandon(self, record: Record) -> None:
        """Leave no half of what MLflow refuses, as far as it lets that be deleted."""
        link = read_link(self.folder)
        if isinstance(record, records.Model) and link is not None:
            with contextlib.suppress(Exception):  # `clean` finds what stays
                logged_model.abandon(self._client, self.folder, link)

    def _offer_failures_again(self) -> None:
        """Offer once more what made the server fail, before a status says that the run is done."""
        for one in cursors.read_cursor(self.folder).offered:
            if one.may_pass and one not in self._offered:
                self._offered.append(one)
                Delivery(self._client, self.folder, one.lane, self._report).retry_refused(one)

    def _deliver_metrics(self) -> bool:
        path, at = self.folder / METRICS_LOG, cursors.read_cursor(self.folder).metrics
        lines = metrics.some_lines(path, at)
        if not lines:
            return False
        link = read_link(self.folder)
        assert link is not None
        points, damaged = metrics.read_points(lines)
        refused = [Refused("metrics", at + n, f"a line of {path.name}", why) for n, why in damaged]

        def check(answer: Answer) -> None:
            self._check(answer, _Next(None, at, at + len(lines)))

        for key, answer, count in metrics.log_points(self._client, link.run_id, points, check):
            refused.append(Refused("metrics", at, key, answer.why, count, may_pass=answer.may_pass))
        self._pass_over(None, at + len(lines), *refused)
        return True

    def retry_refused(self, one: Refused) -> None:
        """Offer once more what MLflow refused; what it takes is not refused any more.

        Raises:
            Away: when it may take it later.
        """
        link = read_link(self.folder)
        if link is None:
            return
        try:
            if one.lane == "metrics":
                metrics.log_again(self._client, link.run_id, self.folder / METRICS_LOG, one)
            else:
                found = _next(self.folder / EVENT_LOG, one.at, one.lane)
                if found.start != one.at or isinstance(found.record, records.Unreadable):
                    return
                if found.record is not None:
                    due = _still_due(self.folder, found)
                    if due is None:
                        calls.delete_staged(self.folder, found.record)
                    else:
                        calls.deliver(self._client, self.folder, due, self._report)
        except Exception as error:
            answer = understand(error)
            if answer.tries is None:
                raise Away(answer.why) from error
            self._check_the_run(answer)
            # None that was not counted.
            again = replace(one, why=answer.why, count=0, may_pass=answer.may_pass)
            cursors.advance(self.folder, self.lane, 0, again)
        else:
            cursors.forget(self.folder, one)

    def _check(self, answer: Answer, found: _Next) -> None:
        """Check that an answer says that MLflow refuses a record.

        Raises:
            Away: if MLflow is away, or refuses the user, or the record has to be tried again.
        """
        if answer.tries is None:
            raise Away(answer.why, retry_after=answer.retry_after)
        if isinstance(found.record, records.Create | records.Begin | records.Status):
            # Nothing is right without them.
            raise Away(answer.why, is_outage=(answer.status or 0) >= 500)
        self._check_the_run(answer)
        at, tries = self._tries
        tries = tries + 1 if at == found.start else 1
        self._tries = found.start, tries
        was_told = answer.why in self._refused_before and not answer.may_pass
        if tries < answer.tries and not was_told:
            wait = _RETRY_SECONDS * (2**tries if answer.may_pass else 1)
            wait = answer.retry_after or wait
            raise Away(answer.why, is_outage=False, retry_after=wait)

    def _check_the_run(self, answer: Answer) -> None:
        """Check that the refusal is of a record: the run is there, and may be written to.

        Raises:
            Away: if not.
        """
        link = read_link(self.folder)
        assert link is not None
        try:
            run = self._client.get_run(link.run_id)
        except Exception as error:
            other = understand(error)
            if other.is_denial:
                raise Away(_denied(other), is_outage=False) from error
            raise Away(other.why, is_outage=other.status != _NOT_FOUND) from error
        if run.info.lifecycle_stage == "deleted":
            message = f"run {link.run_id} was deleted; restore it in MLflow"
            raise Away(message, is_outage=False)
        if answer.is_denial or answer.tries not in (1, None):
            given = run.data.tags.get(names.VERSION)
            if given is None:
                return
            try:
                self._client.set_tag(link.run_id, names.VERSION, given)
            except Exception as error:
                other = understand(error)
                if other.is_denial:
                    raise Away(_denied(other), is_outage=False) from error
                raise Away(other.why) from error

    def _others_done(self, before: int) -> bool:
        """Whether MLflow has, or refuses, what was recorded before a status."""
        at = cursors.read_cursor(self.folder)
        for lane in RECORD_LANES:
            if lane != "status" and at.at(lane) < before:
                return False
        return not metrics.some_lines(self.folder / METRICS_LOG, at.metrics)

    def _pass_over(self, start: int | None, to: int, *refused: Refused) -> None:
        cursors.advance(self.folder, self.lane, to, *refused, start=start)
        for one in refused:
            if one.why not in self._refused_before:
                self._refused_before.add(one.why)
                points = one.lane == "metrics"
                what = f"points of {one.what[:80]!r}" if points else one.what
                self._report(f"MLflow refuses {what}: {one.why}")


def _denied(answer: Answer) -> str:
    return f"MLflow refuses this user ({answer.why})"


def _next(path: Path, start: int, lane: Lane) -> _Next:
    """Return the next record of a lane from a byte on; `fields` has those that cannot be read."""
    at = start
    if path.exists():
        with path.open("rb") as handle:
            handle.seek(start)
            for line in handle:
                if not line.endswith(b"\n"):
                    break  # it is still being written
                end = at + len(line)
                try:
                    record: Record | records.Unreadable = records.decode(line)
                except records.Unreadable as error:
                    record = error
                if _lane(record) == lane:
                    return _Next(record, at, end)
                at = end
    return _Next(None, at, at)


def _lane(record: Record | records.Unreadable) -> Lane:
    return "fields" if isinstance(record, records.Unreadable) else records.lane_of(record)


def _still_due(folder: Path, found: _Next) -> Record | None:
    """Return a record without what later records have replaced; None if nothing of it is left.

    Delivered late it would undo them. A folder of artifacts is merged with what is there, so that
    only its deletion replaces it.
    """
    record = found.record
    assert not isinstance(record, records.Unreadable)
    lane = _lane(record) if record is not None else "fields"
    at = found.end
    while record is not None and (later := _next(folder / EVENT_LOG, at, lane)).record is not None:
        at = later.end
        match record, later.record:
            case records.Artifact(artifact=name), records.Artifact(artifact=other):
                record = None if name == other else record
            case (
                (records.Artifact(artifact=name) | records.Artifacts(artifact=name)),
                records.DeleteArtifact(artifact=other),
            ):
                record = None if _is_below(name, other) else record
            case (
                records.DeleteArtifact(artifact=name),
                (records.Artifact(artifact=other) | records.Artifacts(artifact=other)),
            ):
                record = None if _is_below(other, name) else record
            case records.Tags(tags=tags), records.Tags(tags=others):
                record = _without(tags, others)
            case records.Tags(tags=tags), records.DeleteTag(name=name):
                record = _without(tags, (name,))
            case records.DeleteTag(name=name), records.Tags(tags=others):
                record = None if name in others else record
    return record


def _is_below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def _without(tags: dict[str, str], keys: Collection[str]) -> records.Tags | None:
    left = {key: value for key, value in tags.items() if key not in keys}
    return records.Tags(tags=left) if left else None
