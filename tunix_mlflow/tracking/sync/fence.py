"""Nothing of a delivery is sent when the run's lease is over.

A process that was stopped, or slept, for longer than its lease goes on where it was, perhaps amid
the upload of a folder, while another one continues the run. `http.client` raises an audit event
before it sends anything: the headers, and each block of a body. A hook on it is the last place to
find out, for whatever library makes the request.

Stores that are no HTTP, and libraries that send from threads of their own (S3's), are asked where
the caller calls :func:`check`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_thread = threading.local()


class LeaseOver(BaseException):
    """Something was not sent, since it came too late.

    No Exception, so that no library takes it for a failure that it may repeat or log.
    """


@contextmanager
def guard(is_over: Callable[[], bool]) -> Iterator[None]:
    """Let this thread send nothing, in a block, once `is_over` says so.

    Raises:
        LeaseOver: instead.
    """
    _listen()
    before = getattr(_thread, "is_over", None)
    _thread.is_over = is_over
    try:
        check()
        yield
    finally:
        _thread.is_over = before


def check() -> None:
    """Check that something may be sent.

    Raises:
        LeaseOver: if it may not.
    """
    is_over = getattr(_thread, "is_over", None)
    if is_over is not None and is_over():
        raise LeaseOver


@functools.cache
def _listen() -> None:
    """Add the hook, which cannot be removed again, once."""
    sys.addaudithook(_before_event)


def _before_event(event: str, _: object) -> None:
    if event == "http.client.send":
        check()
