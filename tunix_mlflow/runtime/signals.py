"""SIGINT and SIGTERM as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from tunix_mlflow.errors import Interrupted

_INSIST_SECONDS = 2.0


class StopRequest:
    """A context in which the first signal is noted in `signum`, and saved for the loop.

    The same signal again, 2 s later or more, raises Interrupted at once. The handlers that
    were there before come back at the end. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
        elif signum == self.signum and now - self._since >= _INSIST_SECONDS:
            raise Interrupted(signum)
