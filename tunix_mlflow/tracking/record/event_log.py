"""events.jsonl: everything a run records besides metrics, on the disk before it goes to MLflow.

One record a line, in order: {"op": ..., fields}. Files that records upload and that are not in the
run's folder are copied below staged/ first. cursor.json says how many bytes of events.jsonl and
metrics.jsonl MLflow has.

A record may be delivered twice: a process can die after a call to MLflow and before it moves the
cursor. So each is of a kind that changes nothing the second time; see sync/delivery.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tunix_mlflow import files
from tunix_mlflow.tracking.record.folder import (
    CURSOR,
    EVENT_LOG,
    METRICS_LOG,
    STAGED,
    read_struct,
)


class Cursor(Struct, frozen=True):
    """Bytes that were delivered."""

    events: int = 0
    metrics: int = 0


class EventLog:
    """Appends records for one run folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        complete_lines(folder / EVENT_LOG, truncate=True)
        self._file = (folder / EVENT_LOG).open("a", encoding="utf-8")

    def put(self, op: str, **fields: Any) -> None:
        """Append one record; it is on the disk when this returns."""
        line = json.dumps({"op": op, **fields})
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def stage(self, source: Path) -> str:
        """Copy a file or a folder below staged/.

        Returns:
            Its path below the run's folder; the last part is the name that it had.

        Raises:
            OSError: if it cannot be read or copied.
        """
        target = self.folder / STAGED / uuid.uuid4().hex / source.name
        target.parent.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, target)
            copied = [path for path in target.rglob("*") if path.is_file()]
        else:
            shutil.copyfile(source, target)
            copied = [target]
        for path in copied:
            with path.open("rb+") as handle:
                os.fsync(handle.fileno())
        return target.relative_to(self.folder).as_posix()

    def stage_bytes(self, data: bytes, name: str) -> str:
        """Write a file below staged/; return its path below the run's folder."""
        target = self.folder / STAGED / uuid.uuid4().hex / name
        target.parent.mkdir(parents=True)
        files.write_atomically(target, data)
        return target.relative_to(self.folder).as_posix()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def read_cursor(folder: Path) -> Cursor:
    """Return how much of a folder's logs MLflow has."""
    found: Cursor | None = read_struct(folder / CURSOR, Cursor)
    return found or Cursor()


def move_cursor(folder: Path, to: Cursor) -> None:
    """Record how much of a folder's logs MLflow has."""
    files.write_atomically(folder / CURSOR, msgspec.json.encode(to))


def skip_pending(folder: Path) -> None:
    """Move the cursor to the end: what is pending will not be delivered."""
    move_cursor(folder, Cursor(size(folder / EVENT_LOG), size(folder / METRICS_LOG)))


def pending_bytes(folder: Path) -> int:
    """Return how many bytes of records and metrics MLflow does not have yet."""
    done = read_cursor(folder)
    sizes = [size(folder / EVENT_LOG), size(folder / METRICS_LOG)]
    return max(0, sizes[0] - done.events) + max(0, sizes[1] - done.metrics)


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a folder."""
    for raw in complete_lines(folder / EVENT_LOG).splitlines():
        yield json.loads(raw)


def recorded_status(folder: Path) -> str | None:
    """Return the status that was recorded last; None for a run that did not end."""
    status = None
    for record in read_events(folder):
        if record["op"] in ("create", "begin"):
            status = None
        if record["op"] == "status" and record.get("run_id") is None:
            status = record["status"]
    return status


def recorded_tags(folder: Path) -> dict[str, str]:
    """Return the tags that were recorded in a folder."""
    found: dict[str, str] = {}
    for record in read_events(folder):
        if record["op"] in ("create", "tags"):
            found |= record["tags"]
    return found


def complete_lines(path: Path, start: int = 0, *, truncate: bool = False) -> bytes:
    """Return the bytes of a file of lines from `start` to the end of its last complete line.

    Args:
        path: the file; an absent one is empty.
        start: where to begin.
        truncate: also cut off what a kill left of a last line.
    """
    if not path.exists():
        return b""
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read()
    complete = data[: data.rfind(b"\n") + 1]
    if truncate and len(complete) < len(data):
        os.truncate(path, start + len(complete))
    return complete


def size(path: Path) -> int:
    """Return the bytes of a file; 0 for one that is not there."""
    return path.stat().st_size if path.exists() else 0
