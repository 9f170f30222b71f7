"""What a delivery sends stops within a request when its lease is over."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import requests

from tunix_mlflow.tracking.sync import fence


def test_a_request_stops_between_its_blocks() -> None:
    """Neither another block of a body nor a further request is sent; afterwards requests are."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url, over = "http://{}:{}".format(*server.getsockname()), False

        def blocks() -> Iterator[bytes]:
            nonlocal over
            yield b"first"
            over = True
            yield b"second"

        with pytest.raises(fence.LeaseOver), fence.guard(lambda: over):
            requests.put(url, data=blocks(), timeout=10)
        assert b"first" in (got := received(server))
        assert b"second" not in got
        over = False
        with pytest.raises(fence.LeaseOver), fence.guard(lambda: over):
            over = True
            requests.get(url, timeout=10)
        assert received(server) == b""
        with pytest.raises(fence.LeaseOver), fence.guard(lambda: over):
            pytest.fail("a block was entered after the end")
        with pytest.raises(requests.Timeout):
            requests.get(url, timeout=0.1)
        assert received(server).startswith(b"GET")


def received(server: socket.socket) -> bytes:
    """All that the next connection has brought until it was closed."""
    connection, _ = server.accept()
    with connection:
        connection.settimeout(10)
        return b"".join(iter(lambda: connection.recv(4096), b""))
