"""What a pipeline says while it runs: to a terminal, a notebook, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Receives what a pipeline says while it runs."""

    def info(self, message: str) -> None:
        """Take one line for people."""

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Take the state of a task: `done` of `total` units, and its latest figures."""


class Silent:
    """A Reporter that says nothing."""

    def info(self, message: str) -> None:
        """Drop it."""

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Drop it."""


SILENT = Silent()


def printable(text: str) -> str:
    """Return `text` with control characters escaped, for a terminal, a log or a page."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
