"""Real MLflow servers for tests, on 127.0.0.1."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import requests

from tests.conftest import BIN, environment


class Server(NamedTuple):
    """A server that answers."""

    port: int
    folder: Path  # with its database, its artifacts and its log

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def mlflow_server(
    folder: Path, database: Path, *words: str, extra: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run `mlflow server` in a folder, on a copy of a migrated database.

    Args:
        folder: for everything that it keeps.
        database: a migrated MLflow database; migrating an empty one takes seconds.
        words: more of its arguments.
        extra: more of its environment.
    """
    folder.mkdir(exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    port, log = free_port(), folder / "log"
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    process = launch([*command, *words], log, extra or {})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield Server(port, folder)
    finally:
        end(process)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


def launch(words: list[str], log: Path, extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program as the leader of a process group, with its output in a file."""
    with log.open("wb") as out:
        return subprocess.Popen(
            words,
            env=environment(extra),
            stdout=out,
            stderr=out,
            cwd=log.parent,
            start_new_session=True,
        )


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when an address answers.

    Raises:
        AssertionError: with the end of the log, if the process ends, or after two minutes.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, timeout=2).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, which have nothing to save."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
