"""Pauses a trainer at agreed updates until the benchmark resumes it, so that trainers take turns.

On stdout one JSON object per pause: what happened since the last one. On stdin one line per turn.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Pace:
    """Counts updates, and pauses a trainer.

    Args:
        stops: pause after these numbers of updates.
        wait: returns when the device has done what it was given.
    """

    def __init__(self, stops: Sequence[int], wait: Callable[[], object]) -> None:
        self._stops, self._wait = set(stops), wait
        self._useful: dict[int, int] = {}
        self._losses: dict[int, float] = {}
        self._compile_seconds = 0.0
        self._last_stop, self._start = 0, time.perf_counter()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a trainer prints is not for the benchmark

    def set_useful_tokens(self, step: int, tokens: int) -> None:
        """Set the tokens of update `step`, from 1, that are not padding."""
        self._useful[step] = tokens

    def set_loss(self, step: int, value: float) -> None:
        """Set the loss of update `step`, whenever it is known."""
        self._losses[step] = value

    def add_compile_seconds(self, seconds: float) -> None:
        """Add the time that something took to compile, or to read from the cache."""
        self._compile_seconds += seconds

    def pause_after(self, updates: int) -> None:
        """Pause, if that is agreed after this number of updates; they may still be running."""
        if updates not in self._stops:
            return
        self._wait()
        seconds = time.perf_counter() - self._start
        self._send(
            step=updates,
            seconds=seconds,
            useful_tokens=sum(
                tokens for step, tokens in self._useful.items() if self._last_stop < step <= updates
            ),
            compile_seconds=self._compile_seconds,
            peak_mb=_peak_mb(),
        )
        self._last_stop, self._compile_seconds = updates, 0.0
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has ended")
        self._start = time.perf_counter()

    def end(self) -> None:
        """Send the losses, after the last update."""
        self._send(losses=[self._losses[step] for step in sorted(self._losses)])

    def _send(self, **message: object) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def _peak_mb() -> float:
    """Return the peak of this process's resident megabytes on Linux; 0 elsewhere."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 / 1e6 if match else 0.0
