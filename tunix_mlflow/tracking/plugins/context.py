"""The run-context plugin: tags for runs that are started inside one of our sessions.

MLflow asks every provider at every fluent `start_run` of every program; outside a session
this one is silent. It is not asked when a run is attached by id, so the session sets the
same tags itself.
"""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

_active: list[dict[str, str]] = []


def enter(tags: dict[str, str]) -> None:
    """Begin to add these tags."""
    _active.append(tags)


def leave() -> None:
    """End what the last :func:`enter` began."""
    _active.pop()


class TunixMlflowRunContext(RunContextProvider):
    """Looked up by MLflow through the entry point `mlflow.run_context_provider`."""

    def in_context(self) -> bool:
        """Whether a session is open."""
        return bool(_active)

    def tags(self) -> dict[str, str]:
        """The tags of the innermost session."""
        return dict(_active[-1]) if _active else {}
