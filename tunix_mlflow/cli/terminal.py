"""What commands write: messages and progress to stderr, results to stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import click
from tqdm import tqdm

from tunix_mlflow.runtime.report import printable

_QUIET_SECONDS = 1.0  # what takes less has no progress to show


@dataclass
class _Task:
    bar: Any  # tqdm's; None: stderr is no terminal
    first: int  # what was done when it began
    done: int
    start: float  # seconds
    figures: dict[str, str] = field(default_factory=dict)  # the latest


class Terminal:
    """A Reporter that writes to stderr, so that stdout has only results.

    Progress is a bar on a terminal, and elsewhere a line for each tenth of what takes longer than a
    second. Used as a context, it closes the bars at the end.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks.values():
            if task.bar is not None:
                task.bar.close()
        self._tasks.clear()

    def info(self, message: str) -> None:
        """Write a message, above the bars."""
        text = "\n".join(printable(line) for line in message.splitlines())
        if any(task.bar is not None for task in self._tasks.values()):
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show the state of a task."""
        if task not in self._tasks:
            self._tasks[task] = _begin(task, done, total)
        state = self._tasks[task]
        state.figures.update({name: _figure(value) for name, value in figures.items()})
        if state.bar is not None:
            state.bar.set_postfix(state.figures, refresh=False)
            state.bar.update(done - state.bar.n)
        elif _tenth(done, total) != _tenth(state.done, total):
            seconds = time.monotonic() - state.start
            if seconds > _QUIET_SECONDS:
                left = seconds / (done - state.first) * (total - done)
                parts = [f"{name} {value}" for name, value in state.figures.items()]
                self.info(f"{task} {done:,}/{total:,}: {', '.join([*parts, f'{left:.0f} s left'])}")
        state.done = done
        if done >= total:
            if state.bar is not None:
                state.bar.close()
            del self._tasks[task]


def print_result(**result: Any) -> None:
    """Print the result of a stage: the last line of stdout is JSON."""
    print_json(result)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, without control characters."""
    text = json.dumps(value, ensure_ascii=False)
    text = re.sub("[\x7f-\x9f\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    click.echo(text)


def _begin(task: str, done: int, total: int) -> _Task:
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(
            total=total, initial=done, desc=task, dynamic_ncols=True, unit_scale=total > 10**6
        )
    return _Task(bar, done, done, time.monotonic())


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _tenth(done: int, total: int) -> int:
    return 10 * done // max(total, 1)
