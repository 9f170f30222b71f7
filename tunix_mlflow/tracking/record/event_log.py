"""What a run has to tell MLflow, on the disk first.

    outbox.jsonl     one record a line, in order: {"op": ..., fields}
    outbox/          texts that records store as artifacts
    cursor.json      how many bytes of outbox.jsonl and metrics.jsonl MLflow has
    run.json         the MLflow run that this folder became, and where

Every record may be delivered twice: a process can die between telling MLflow and moving the
cursor. So each is of a kind that changes nothing the second time; see delivery.py.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tunix_mlflow.errors import TrackingError

EVENT_LOG, CURSOR, RUN = "outbox.jsonl", "cursor.json", "run.json"


class Cursor(Struct, frozen=True):
    """Bytes that were delivered."""

    outbox: int = 0
    journal: int = 0


class RunLink(Struct, frozen=True):
    """What run.json says."""

    run_id: str  # MLflow's
    experiment_id: str
    tracking_uri: str  # without credentials
    model_id: str | None = None  # of the model that was logged last


class EventLog:
    """Appends records for one run folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        whole_lines(folder / EVENT_LOG, mend=True)
        self._file = (folder / EVENT_LOG).open("a", encoding="utf-8")

    def put(self, op: str, **fields: Any) -> None:
        """Record one thing; on the disk when this returns."""
        with self._lock:
            self._file.write(json.dumps({"op": op, **fields}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def put_text(self, text: str, artifact: str) -> str:
        """Record a text to be stored as an artifact; returns its path below the folder."""
        path = self.folder / "outbox" / artifact
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
        name = path.relative_to(self.folder).as_posix()
        self.put("artifact", path=name, artifact=artifact)
        return name

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cursor(folder: Path) -> Cursor:
    """How far MLflow has been told."""
    found: Cursor | None = _read(folder / CURSOR, Cursor)
    return found or Cursor()


def move_cursor(folder: Path, to: Cursor) -> None:
    """Remember how far MLflow has been told."""
    write_whole(folder / CURSOR, msgspec.json.encode(to))


def skip(folder: Path) -> None:
    """Leave what was not delivered untold."""
    move_cursor(folder, Cursor(size(folder / EVENT_LOG), size(folder / "metrics.jsonl")))


def known(folder: Path) -> RunLink | None:
    """The MLflow run of a folder; None while it has none."""
    found: RunLink | None = _read(folder / RUN, RunLink)
    return found


def set_known(folder: Path, what: RunLink) -> None:
    """Remember the MLflow run of a folder."""
    write_whole(folder / RUN, msgspec.json.encode(what))


def waiting(folder: Path) -> int:
    """Bytes of records and metrics that MLflow was not told yet."""
    told = cursor(folder)
    sizes = [size(folder / EVENT_LOG), size(folder / "metrics.jsonl")]
    return max(0, sizes[0] - told.outbox) + max(0, sizes[1] - told.journal)


def whole_lines(path: Path, start: int = 0, *, mend: bool = False) -> bytes:
    """The bytes of a file of lines from `start` to the end of its last whole line.

    Args:
        path: the file; an absent one is empty.
        start: where to begin.
        mend: also cut off what a kill left of a last line.
    """
    if not path.exists():
        return b""
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(path, start + len(whole))
    return whole


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)


def size(path: Path) -> int:
    """Bytes of a file; 0 for one that is not there."""
    return path.stat().st_size if path.exists() else 0


def _read(path: Path, kind: type[Any]) -> Any:
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, OSError) as error:
        raise TrackingError(f"{path} is damaged: {error}; restore the file") from error
