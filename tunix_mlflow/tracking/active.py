"""What is set while a run is open: MLflow's active run, and how patient its requests are."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mlflow.entities import Run as RunEntity
from mlflow.entities import RunData, RunInfo
from mlflow.tracking import fluent

from tunix_mlflow.tracking.plugins import context

_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# MLflow's own retries would only hide an outage: records are delivered again for as long as it
# takes.
_LIMITS = {_RETRIES: "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_requests_lock = threading.Lock()
_limited = 0  # by so many open runs
_unrepeated = 0  # in so many blocks of :func:`no_retries`
_theirs: dict[str, str | None] = {}  # as the user has them
_ours: dict[str, str | None] = {}  # as they were set here


class Activation:
    """MLflow's active run of this thread, from now until :meth:`end`.

    The run is put on MLflow's own stack, and taken off without a call to the server:
    `mlflow.end_run` would set a status before the run's records are delivered.

    Args:
        info: returns the run's info; asked each time, since a run that began while the server was
            away gets its id later.
    """

    def __init__(self, info: Callable[[], RunInfo]) -> None:
        # Of the thread that began the run; another one may end it.
        self._stack: list[Any] = fluent._active_run_stack.get()
        self.run = _ActiveRun(info)
        self._stack.append(self.run)
        self._context = context.enter()

    def leave(self) -> None:
        """Forget the run in a forked process, whose stack MLflow has emptied."""
        context.leave(self._context)

    def end(self) -> None:
        """Take the run off the stack; does nothing if the user ended it through MLflow."""
        fluent._last_active_run_id.set(self.run.info.run_id)
        self._stack[:] = [run for run in self._stack if run is not self.run]
        context.leave(self._context)


class _ActiveRun(fluent.ActiveRun):
    """A run whose id MLflow may give later."""

    def __init__(self, info: Callable[[], RunInfo]) -> None:
        self._current = info
        super().__init__(RunEntity(info(), RunData()))

    @property
    def info(self) -> RunInfo:
        return self._current()


def set_request_limits() -> None:
    """Make MLflow's requests give up soon, where the user has not said otherwise.

    Each call is undone by one of :func:`restore_request_limits`; the environment is as it was
    after the last.
    """
    _change(limited=1)


def restore_request_limits() -> None:
    """Undo one :func:`set_request_limits`."""
    _change(limited=-1)


@contextlib.contextmanager
def no_retries() -> Iterator[None]:
    """Let MLflow's client repeat no request of this process, for the length of a block.

    A request that makes something would make it twice, where only the answer was lost.
    """
    _change(unrepeated=1)
    try:
        yield
    finally:
        _change(unrepeated=-1)


def _change(*, limited: int = 0, unrepeated: int = 0) -> None:
    """Count who needs the variables changed, and set them for those that are left."""
    global _limited, _unrepeated
    with _requests_lock:
        changed = _limited or _unrepeated
        _limited += limited
        _unrepeated += unrepeated
        for name, limit in _LIMITS.items():
            present = os.environ.get(name)
            if not changed or present != _ours[name]:  # the user may say otherwise meanwhile
                _theirs[name] = present
            value = _theirs[name]
            if value is None and _limited:
                value = limit
            if name == _RETRIES and _unrepeated:
                value = "0"
            _ours[name] = value
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
