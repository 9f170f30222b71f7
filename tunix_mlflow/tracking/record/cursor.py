"""cursor.json: how much of a run's logs MLflow has, by lane, and what it refuses."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tunix_mlflow import files
from tunix_mlflow.tracking.record.folder import CURSOR, EVENT_LOG, METRICS_LOG
from tunix_mlflow.tracking.record.records import RECORD_LANES, Lane

_lock = threading.Lock()  # lanes move in threads of their own


class Refused(Struct, frozen=True):
    """Something that MLflow refuses: passed over, and offered again by `sync`."""

    lane: Lane
    at: int  # bytes before its record; of metrics: before the first line with the key
    what: str  # in words; of metrics: the key
    why: str
    count: int = 1  # records, or points
    skipped: bool = False  # `sync --skip`: not offered again
    may_pass: bool = False  # a failure of the server: offered again when the run ends, too


class Cursor(Struct, frozen=True):
    """Bytes of the logs that each lane is done with."""

    fields: int = 0
    metrics: int = 0
    artifacts: int = 0
    models: int = 0
    status: int = 0
    refused: tuple[Refused, ...] = ()

    def at(self, lane: Lane) -> int:
        """Return how many bytes a lane is done with."""
        done: int = getattr(self, lane)
        return done

    @property
    def offered(self) -> tuple[Refused, ...]:
        """What `sync` offers again: what is refused and was not set aside."""
        return tuple(one for one in self.refused if not one.skipped)


def read_cursor(folder: Path) -> Cursor:
    """Return how much of a folder's logs MLflow has.

    A file that is damaged, or that names more than the logs hold, is as if it were not there:
    everything is delivered again, which changes nothing.
    """
    try:
        found = msgspec.json.decode((folder / CURSOR).read_bytes(), type=Cursor)
    except FileNotFoundError:
        return Cursor()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Cursor()
    events, metrics = size(folder / EVENT_LOG), size(folder / METRICS_LOG)
    if any(found.at(lane) > events for lane in RECORD_LANES):
        return Cursor(metrics=min(found.metrics, metrics))
    return found if found.metrics <= metrics else rewind_metrics(found)


def rewind_metrics(cursor: Cursor) -> Cursor:
    """Return a cursor with all metrics still to deliver."""
    others = tuple(one for one in cursor.refused if one.lane != "metrics")
    return replace(cursor, metrics=0, refused=others)


def update_cursor(folder: Path, change: Callable[[Cursor], Cursor]) -> Cursor:
    """Change a folder's cursor; safe while several threads do so."""
    with _lock:
        before = read_cursor(folder)
        after = change(before)
        if after != before or not (folder / CURSOR).exists():
            files.write_atomically(folder / CURSOR, msgspec.json.encode(after))
        return after


def advance(folder: Path, lane: Lane, to: int, *refused: Refused, start: int | None = None) -> None:
    """Record that a lane is done with its log up to here.

    Args:
        folder: the run's.
        lane: which.
        to: bytes from the beginning of its log.
        refused: what MLflow refuses of what the lane has passed.
        start: of the lane's record that ends at `to`. Lanes that have come to it pass it too, in
            the same write, since it is none of theirs.
    """

    def change(cursor: Cursor) -> Cursor:
        passed = [lane] + [one for one in RECORD_LANES if start == cursor.at(one)]
        moved: dict[str, int] = {one: max(to, cursor.at(one)) for one in passed}
        return replace(cursor, **moved, refused=_merged(cursor.refused, refused))

    update_cursor(folder, change)


def forget(folder: Path, one: Refused) -> None:
    """Record that something is not refused any more."""
    update_cursor(
        folder,
        lambda cursor: replace(
            cursor, refused=tuple(other for other in cursor.refused if not _same(other, one))
        ),
    )


def skip_pending(folder: Path) -> None:
    """Move every lane to the end: what is pending will not be delivered."""
    events, metrics = size(folder / EVENT_LOG), size(folder / METRICS_LOG)
    ends = dict.fromkeys(RECORD_LANES, events)
    update_cursor(folder, lambda cursor: replace(cursor, metrics=metrics, **ends))


def pending_bytes(folder: Path, *lanes: Lane) -> int:
    """Return how many bytes of the logs MLflow does not have yet, refused ones aside.

    Args:
        folder: the run's.
        lanes: count these; none: all. Records of other lanes count until a lane has passed them.
    """
    cursor, total = read_cursor(folder), 0
    for lane in lanes or (*RECORD_LANES, "metrics"):
        log = METRICS_LOG if lane == "metrics" else EVENT_LOG
        total += max(0, size(folder / log) - cursor.at(lane))
    return total


def refused_counts(folder: Path) -> dict[str, int]:
    """Return how many records, and points, MLflow refuses, by lane."""
    counts: Counter[str] = Counter()
    for one in read_cursor(folder).refused:
        counts[one.lane] += one.count
    return dict(sorted(counts.items()))


def size(path: Path) -> int:
    """Return the bytes of a file; 0 for one that is not there."""
    return path.stat().st_size if path.exists() else 0


def _merged(before: tuple[Refused, ...], found: tuple[Refused, ...]) -> tuple[Refused, ...]:
    merged = list(before)
    for one in found:
        for n, other in enumerate(merged):
            if _same(other, one):
                count = other.count + one.count if one.lane == "metrics" else 1
                merged[n] = replace(other, why=one.why, count=count, may_pass=one.may_pass)
                break
        else:
            merged.append(one)
    return tuple(merged)


def _same(a: Refused, b: Refused) -> bool:
    """Whether both are of the same record, or of the same metric."""
    return a.lane == b.lane and (a.what == b.what if a.lane == "metrics" else a.at == b.at)
