"""A lock file for the catalog: many readers or one writer, without starvation.

DuckDB refuses a reader while a writer holds the file, and the other way round. So processes wait
here, where the wait is bounded. The kernel releases the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tunix_mlflow.runtime.waiting import try_lock, wait_for

WAIT_SECONDS = 60.0


@contextmanager
def held(path: Path, *, write: bool) -> Iterator[None]:
    """Hold the lock of the file at `path`; that file itself is not opened.

    Raises:
        UnavailableError: if it was not free for WAIT_SECONDS.
        OSError: if the lock file cannot be created.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    # A process that waits for the lock holds the gate, so later readers queue behind a writer.
    with (
        _locked(Path(f"{path}.gate"), True, deadline, path) as gate,
        _locked(Path(f"{path}.lock"), write, deadline, path),
    ):
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextmanager
def _locked(file: Path, exclusive: bool, deadline: float, what: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    lock = partial(try_lock, handle, exclusive=exclusive)
    try:
        wait_for(lock, f"the catalog {what}", deadline - time.monotonic(), file=file)
        yield handle
    finally:
        os.close(handle)
