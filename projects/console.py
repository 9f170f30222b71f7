"""What the stages say on a terminal: messages, a progress bar, and one JSON line at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


def say(message: str) -> None:
    """One line for people, on stderr, so that stdout stays for results."""
    print(message, file=sys.stderr, flush=True)


def result(**figures: Any) -> None:
    """The stage's result: the last line of stdout is JSON."""
    print(json.dumps(figures), flush=True)


class TrainingProgress:
    """A MetricWriter that shows where training is: a bar on a terminal, else a line a tenth."""

    def __init__(self, first: int, last: int) -> None:
        self._last, self._first, self._start = last, first, time.monotonic()
        self._bar = (
            tqdm(total=last, initial=first, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._shown: dict[str, str] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show loss, tokens a second and time left."""
        names = {"train/loss": "loss", "perf/tokens_per_sec": "tok/s"}
        for key, name in names.items():
            if key in scalars:
                value = scalars[key]
                self._shown[name] = f"{value:,.0f}" if name == "tok/s" else f"{value:.4f}"
        if "eval/loss" in scalars:
            message = f"step {step}: held-out loss {scalars['eval/loss']:.4f}"
            if self._bar is None:
                say(message)
            else:
                self._bar.write(message, file=sys.stderr)
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif "train/loss" in scalars and self._tenth(step) != self._tenth(step - 1):
            done = step - self._first
            left = (time.monotonic() - self._start) / done * (self._last - step)
            figures = ", ".join(f"{name} {value}" for name, value in self._shown.items())
            say(f"step {step}/{self._last}: {figures}, {left:.0f} s left")

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()

    def _tenth(self, step: int) -> int:
        return 10 * step // self._last
