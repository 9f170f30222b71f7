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

# MLflow's own retries would only hide an outage: records are delivered again for as long as it
# takes.
_REQUESTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_requests_lock = threading.Lock()
_requests_users = 0
_requests_set: list[str] = []


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
    global _requests_users
    with _requests_lock:
        if _requests_users == 0:
            _requests_set[:] = [name for name in _REQUESTS if name not in os.environ]
            os.environ.update({name: _REQUESTS[name] for name in _requests_set})
        _requests_users += 1


@contextlib.contextmanager
def no_retries() -> Iterator[None]:
    """Let no request of a block be repeated by MLflow's client.

    What makes something would make it twice, where only the answer was lost.
    """
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def restore_request_limits() -> None:
    """Undo one :func:`set_request_limits`."""
    global _requests_users
    with _requests_lock:
        _requests_users -= 1
        if _requests_users == 0:
            for name in _requests_set:
                if os.environ.get(name) == _REQUESTS[name]:
                    del os.environ[name]
