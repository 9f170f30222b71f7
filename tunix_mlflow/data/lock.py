"""A lock file for the catalog: many readers or one writer, without starvation.

DuckDB refuses a reader while a writer holds the file, and the other way round. So processes wait
here, where the wait is bounded. The kernel releases the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunix_mlflow.runtime.waiting import wait_for

WAIT_SECONDS = 60.0


@contextmanager
def held(path: Path, *, write: bool) -> Iterator[None]:
    """Hold the lock of the file at `path`; that file itself is not opened.

    Raises:
        UnavailableError: if it was not free for WAIT_SECONDS.
        OSError: if the lock file cannot be created.
    """
    # A process that waits for the lock holds the gate, so later readers queue behind a writer.
    with (
        _locked(Path(f"{path}.gate"), exclusive=True, what=path) as gate,
        _locked(Path(f"{path}.lock"), exclusive=write, what=path),
    ):
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextmanager
def _locked(file: Path, *, exclusive: bool, what: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH

    def lock() -> bool:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        wait_for(lock, f"the catalog {what}", WAIT_SECONDS, file=file)
        yield handle
    finally:
        os.close(handle)
