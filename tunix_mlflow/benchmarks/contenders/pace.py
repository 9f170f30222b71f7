"""A trainer that stops at agreed steps and waits for a word, so that contenders take turns.

On stdout one JSON object a line: what happened since the last word. On stdin one line a word.
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
    """Counts steps, and pauses a trainer."""

    def __init__(self, stops: Sequence[int], resolve_auto: Callable[[], None]) -> None:
        """Begin.

        Args:
            stops: numbers of updates after which to pause.
            settle: waits until the device has done what it was given.
        """
        self._stops, self._settle = set(stops), resolve_auto
        self._useful: dict[int, int] = {}
        self._losses: dict[int, float] = {}
        self._compiling = 0.0
        self._since, self._at = 0, time.perf_counter()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a trainer prints is not for the benchmark

    def useful(self, step: int, tokens: int) -> None:
        """Update number `step`, from 1, is on so many tokens that are not padding."""
        self._useful[step] = tokens

    def loss(self, step: int, value: float) -> None:
        """The loss of that update, whenever it is known."""
        self._losses[step] = value

    def compiled(self, seconds: float) -> None:
        """So long it took to compile something, or to read it from the cache."""
        self._compiling += seconds

    def done(self, steps: int) -> None:
        """So many updates were asked for; pauses where that was agreed."""
        if steps not in self._stops:
            return
        self._settle()
        seconds = time.perf_counter() - self._at
        tokens = sum(n for step, n in self._useful.items() if self._since < step <= steps)
        self._say(
            step=steps,
            seconds=seconds,
            useful=tokens,
            compiling=self._compiling,
            peak_mb=_peak_mb(),
        )
        self._since, self._compiling = steps, 0.0
        if not sys.stdin.readline():
            raise SystemExit("the benchmark is gone")
        self._at = time.perf_counter()

    def end(self) -> None:
        """The trainer has returned."""
        losses = [self._losses[step] for step in sorted(self._losses)]
        self._say(losses=losses)

    def _say(self, **words: object) -> None:
        self._out.write(json.dumps(words) + "\n")
        self._out.flush()


def _peak_mb() -> float:
    """Resident megabytes of this process at most, as Linux counts them; 0 elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else 0.0
