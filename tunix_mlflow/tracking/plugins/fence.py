"""The request-header plugin: no request of a delivery leaves when the run's lease is over.

A process that was stopped, or slept, for longer than its lease goes on where it was, perhaps amid
the upload of a folder, while another one continues the run. MLflow asks every provider of headers
before each request, which is the last place to find that out. This one adds no header.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

_thread = threading.local()


class LeaseOver(BaseException):
    """A request was not sent, since it came too late.

    No Exception: MLflow logs those of a provider, and sends the request.
    """


@contextmanager
def guard(is_over: Callable[[], bool]) -> Iterator[None]:
    """Let no request of this thread leave, in a block, once `is_over` says so.

    Raises:
        LeaseOver: instead.
    """
    before = getattr(_thread, "is_over", None)
    _thread.is_over = is_over
    try:
        check()
        yield
    finally:
        _thread.is_over = before


def check() -> None:
    """Check that a request may leave.

    Raises:
        LeaseOver: if it may not.
    """
    is_over = getattr(_thread, "is_over", None)
    if is_over is not None and is_over():
        raise LeaseOver


class TunixMlflowFence(RequestHeaderProvider):
    """Looked up by MLflow through the entry point `mlflow.request_header_provider`."""

    def in_context(self) -> bool:
        """Return False, since there is no header to add."""
        check()
        return False

    def request_headers(self) -> dict[str, str]:
        """Return nothing."""
        return {}
