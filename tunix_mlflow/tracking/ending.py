"""How a run ends: the status of each way out, and runs that nobody ended."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from tunix_mlflow.errors import Interrupted
from tunix_mlflow.files import one_line

_INSIST_SECONDS = 2.0


class Endable(Protocol):
    """A run that can be ended."""

    def end(self, status: str = "FINISHED", error: str | None = None) -> bool:
        """End it; a second call does nothing."""

    def leave(self) -> None:
        """Let go of it in a forked process: it stays the parent's."""


class _Open(NamedTuple):
    run: Endable
    pid: int
    shown: object  # the error that the interpreter had shown before, as a notebook's earlier cell


_open: list[_Open] = []
incomplete: list[str] = []
"""Ids of runs of this process that ended while MLflow refused a part of them."""


def outcome(error: BaseException | None) -> tuple[str, str | None]:
    """Return the status and the message of a run whose block ended with an error, or without."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "FINISHED", None
    if isinstance(error, Interrupted | KeyboardInterrupt):
        number = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        return "KILLED", f"interrupted by {signal.Signals(number).name}"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return "FAILED", f"exited with code {error.code}"
    return "FAILED", one_line(error)


def register(run: Endable) -> None:
    """Have a run ended when the process exits, if nobody ends it before."""
    _open.append(_Open(run, os.getpid(), getattr(sys, "last_value", None)))


def unregister(run: Endable) -> None:
    """Take back one :func:`register`."""
    _open[:] = [one for one in _open if one.run is not run]


@contextlib.contextmanager
def undisturbed(give_up: Callable[[], None], *, interrupted: bool) -> Iterator[None]:
    """Let no signal keep a run from getting its status, for the length of a block.

    The handlers that were there before come back at its end, and get the first signal that came
    meanwhile. Outside the main thread nothing is changed.

    Args:
        give_up: called by a signal that comes after two seconds; ends the wait for MLflow.
        interrupted: a signal ended the run; those that follow it are repetitions, and dropped.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield  # a handler that was not installed by Python could not be restored
        return
    begun = time.monotonic()
    came: list[int] = []

    def insist(number: int, _: object) -> None:
        came.append(number)
        if time.monotonic() - begun > _INSIST_SECONDS:
            give_up()

    for number in numbers:
        signal.signal(number, insist)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and not interrupted:
            signal.raise_signal(came[0])


def _end_open_runs() -> None:
    """End what is still open as the interpreter exits: FAILED after an error that nobody caught."""
    for run, pid, shown in reversed(_open[:]):
        error = getattr(sys, "last_value", None)
        if pid == os.getpid():  # a forked process has no part in its parent's runs
            with contextlib.suppress(Exception):
                run.end(*outcome(error if error is not shown else None))


def _leave_open_runs() -> None:
    """Take no part in the runs of the process that this one was forked from."""
    for one in _open:
        one.run.leave()
    _open.clear()


atexit.register(_end_open_runs)
os.register_at_fork(after_in_child=_leave_open_runs)
