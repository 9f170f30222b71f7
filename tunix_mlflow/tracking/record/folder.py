"""The folder of a run: the names of its files, its lock, and the MLflow run that it belongs to.

docs/run-folder.md says of every file what it is, who writes it and who reads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from tunix_mlflow import files
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.runtime.waiting import holder

METRICS_LOG = "metrics.jsonl"
EVENT_LOG = "events.jsonl"
CURSOR = "cursor.json"
RUN_LINK = "run.json"
LOCK = "lock"
LEASE = "lease"
REFILL = "refill"
STAGED = "staged"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
MODELS = "models"
PACKAGES = "packages"


class RunLink(Struct, frozen=True):
    """The content of run.json: the MLflow run that a folder belongs to."""

    run_id: str
    experiment_id: str
    tracking_uri: str  # without credentials
    model_id: str | None = None  # of the model that was logged last


def read_link(folder: Path) -> RunLink | None:
    """Return the MLflow run of a folder; None while MLflow has none.

    Raises:
        TrackingError: if run.json is damaged.
    """
    found: RunLink | None = read_struct(folder / RUN_LINK, RunLink)
    return found


def write_link(folder: Path, link: RunLink) -> None:
    """Record the MLflow run of a folder."""
    files.write_atomically(folder / RUN_LINK, msgspec.json.encode(link))


def lock(folder: Path) -> FileLock:
    """Create a run's folder where it is missing, and take its lock.

    The system drops the lock with the process, however that dies.

    Raises:
        UnavailableError: if another process has the run open, or the disk cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        held = FileLock(folder / LOCK)
        held.acquire(timeout=0)
    except Timeout as error:
        who = holder(folder / LOCK) or "another process on this machine"
        raise UnavailableError(
            f"run {folder.name} is open in {who}; wait for it or end it"
        ) from error
    except OSError as error:
        raise UnavailableError(f"cannot write to {folder}: {files.one_line(error)}") from error
    return held


def leave(held: FileLock) -> None:
    """Let go of a lock in a forked process: it stays the parent's.

    `FileLock.release`, which its deletion calls too, would unlock it for both.
    """
    handle, held._context.lock_file_fd = held._context.lock_file_fd, None
    if handle is not None:
        os.close(handle)


def is_open(folder: Path) -> bool:
    """Return whether a process on this machine has the run open."""
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        return True
    held.release()
    return False


def read_struct(path: Path, kind: type[Any]) -> Any:
    """Return a JSON file as a Struct; None for a file that is not there.

    Raises:
        TrackingError: if it is damaged.
    """
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise TrackingError(
            f"{path} is damaged: {files.one_line(error)}; run tunix-mlflow runs repair"
            f" {path.parent.name}"
        ) from error
