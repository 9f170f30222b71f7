"""The run-context plugin: the version tag for runs that are started inside one of ours.

MLflow asks every provider at every fluent `start_run` of every program. This one is silent unless a
run of ours is open in the same thread.
"""

from __future__ import annotations

import threading

from mlflow.tracking.context.abstract_context import RunContextProvider

_thread = threading.local()


def enter() -> list[None]:
    """Begin to add the tag in this thread; pass the result to :func:`leave`."""
    stack: list[None] = _thread.__dict__.setdefault("stack", [])
    stack.append(None)
    return stack


def leave(stack: list[None]) -> None:
    """End one :func:`enter`; in any thread."""
    stack.pop()


class TunixMlflowRunContext(RunContextProvider):
    """Looked up by MLflow through the entry point `mlflow.run_context_provider`."""

    def in_context(self) -> bool:
        """Return whether a run of ours is open in this thread."""
        return bool(_thread.__dict__.get("stack"))

    def tags(self) -> dict[str, str]:
        """Return the version of this library."""
        from tunix_mlflow.version import __version__

        return {"tunix_mlflow.version": __version__}
