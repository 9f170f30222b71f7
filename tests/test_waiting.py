"""Waiting for a lock: who holds it is told after five seconds, and the wait has an end."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import environment
from tunix_mlflow.data import lock
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.runtime import waiting

HOLDING = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file that another process has locked, and the process."""
    file = tmp_path / "catalog.lock"
    words = [sys.executable, "-c", HOLDING, str(file)]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield file, process.pid
        process.kill()


def test_who_holds_a_lock_is_told(
    held: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, while it is waited for, and again in the error at the end."""
    file, process = held
    monkeypatch.setattr(waiting, "TOLD_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.5)
    with (
        caplog.at_level(logging.WARNING, "tunix_mlflow"),
        pytest.raises(UnavailableError, match=f"held by process {process} "),
        lock.held(file.with_suffix(""), write=True),
    ):
        raise AssertionError("it was not free")
    (line,) = caplog.messages
    assert line.startswith(f"waiting for the catalog {file.with_suffix('')}, held by process")
    assert line.endswith("at most 0 s")


def test_nobody_is_named_where_nobody_is_known(tmp_path: Path) -> None:
    """A file that is not there, or that nobody has locked."""
    assert waiting.holder(tmp_path / "none") is None
    (tmp_path / "free").touch()
    assert waiting.holder(tmp_path / "free") is None


def test_what_is_free_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing is said."""
    tries = [False, False, True]
    waiting.wait_for(lambda: tries.pop(0), "something", 1.0)
    assert not tries
    assert not caplog.messages
