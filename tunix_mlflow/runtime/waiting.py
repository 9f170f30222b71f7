"""Waiting for what another process holds: a line after five seconds, and an end."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tunix_mlflow.errors import UnavailableError

TOLD_SECONDS = 5.0
_LOCKS = Path("/proc/locks")
_logger = logging.getLogger("tunix_mlflow")


def wait_for(
    attempt: Callable[[], bool],
    what: str,
    seconds: float,
    *,
    file: Path | None = None,
    longest_pause: float = 0.05,
) -> None:
    """Try again and again; after five seconds say once, by the log, what is waited for.

    Args:
        attempt: returns whether it succeeded.
        what: is waited for, in a few words.
        seconds: until it is given up.
        file: a locked file, whose holder is named.
        longest_pause: seconds between two attempts, at most.

    Raises:
        UnavailableError: when the time is over.
    """
    begun = time.monotonic()
    pause, told = 0.001, False
    while not attempt():
        waited = time.monotonic() - begun
        if waited > seconds:
            raise UnavailableError(
                f"{what}: {_held_by(file)}waited for {seconds:.0f} s; try again later"
            )
        if waited > TOLD_SECONDS and not told:
            told = True
            _logger.warning("waiting for %s, %sat most %.0f s", what, _held_by(file), seconds)
        time.sleep(pause)
        pause = min(longest_pause, pause * 2)


def try_lock(handle: int, *, exclusive: bool = True) -> bool:
    """Take the kernel's lock of an open file, and return whether it was free."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(file: Path) -> str | None:
    """Return which process has a file locked; None where that is not known.

    Linux tells it, of processes that this one can see.
    """
    try:
        stat = file.stat()
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return None
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for line in lines:
        fields = line.split()
        if len(fields) > 5 and fields[5] == place and fields[4] != str(os.getpid()):
            try:
                command = " ".join(psutil.Process(int(fields[4])).cmdline())[:80]
            except (psutil.Error, ValueError):
                continue  # it waits for the lock, or has just ended
            return f"process {fields[4]} ({command})"
    return None


def _held_by(file: Path | None) -> str:
    found = holder(file) if file is not None else None
    return f"held by {found}, " if found else ""
