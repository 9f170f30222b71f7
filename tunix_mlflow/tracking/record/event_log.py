"""events.jsonl: everything a run records besides metrics, on the disk before it goes to MLflow.

One record a line, in order; see record/records.py. Files that records upload and that are not in
the run's folder are copied below staged/ first. cursor.json says how much of events.jsonl and
metrics.jsonl MLflow has.

A record may be delivered twice: a process can die after a call to MLflow and before it moves the
cursor. So each is of a kind that changes nothing the second time; see sync/delivery.py.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from tunix_mlflow import files
from tunix_mlflow.tracking.record import records
from tunix_mlflow.tracking.record.folder import EVENT_LOG, STAGED
from tunix_mlflow.tracking.record.records import Record


class EventLog:
    """Appends records for one run folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        complete_lines(folder / EVENT_LOG, truncate=True)
        self._file = (folder / EVENT_LOG).open("ab")

    def put(self, record: Record) -> None:
        """Append one record; it is on the disk when this returns."""
        line = records.encode(record)
        with self._lock:
            self._file.write(line)
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


def read_records(folder: Path, start: int = 0) -> Iterator[tuple[int, Record | records.Unreadable]]:
    """Yield the records of a folder from a byte on, each with the byte at which its line ends."""
    end = start
    for raw in complete_lines(folder / EVENT_LOG, start).splitlines(keepends=True):
        end += len(raw)
        try:
            yield end, records.decode(raw)
        except records.Unreadable as error:
            yield end, error


def recorded_end(folder: Path) -> records.Status | None:
    """Return the status that was recorded last; None for a run that did not end."""
    end = None
    for _, record in read_records(folder):
        match record:
            case records.Create() | records.Begin():
                end = None
            case records.Status(run_id=None):
                end = record
    return end


def recorded_status(folder: Path) -> str | None:
    """Return the status that was recorded last, in words; None for a run that did not end."""
    end = recorded_end(folder)
    return None if end is None else end.status


def recorded_tags(folder: Path) -> dict[str, str]:
    """Return the tags that were recorded in a folder."""
    found: dict[str, str] = {}
    for _, record in read_records(folder):
        if isinstance(record, records.Create | records.Tags):
            found |= record.tags
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
