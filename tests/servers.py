"""Real MLflow servers for tests, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import requests

from tests.conftest import BIN, environment

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


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


@contextmanager
def model_server(model: Path, folder: Path) -> Iterator[int]:
    """Run `mlflow models serve` on a model's folder, with its log in another; yields the port."""
    folder.mkdir(exist_ok=True)
    port, log = free_port(), folder / "log"
    command = [str(BIN / "mlflow"), "models", "serve", "--model-uri", str(model)]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    process = launch([*command, "--workers", "1"], log, {})
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process, log)
        yield port
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


Rule = Callable[[str, str, int], int | str | None]
"""From method, path and length of a request to what happens to it: it is answered with a status;
`garbage`: 200 and no JSON; `redirect`; `reset`: no answer; `lost`: the server does it, and there is
no answer; `slow`: it takes seconds; None: it is passed on."""
_SLOW_SECONDS = 6.0


class RefusingProxy:
    """A port in front of a server that does not pass all requests on.

    Attributes:
        rule: what happens to a request.
    """

    def __init__(self, target: str, rule: Rule) -> None:
        self.rule, self._target = rule, target
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer takes 40 ms

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b""
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = b"".join(iter(self.chunk, b""))
                fault = proxy.rule(self.command, self.path, len(body))
                html = {"Content-Type": "text/html"}
                if fault == 429:
                    html["Retry-After"] = "1"
                if fault == "redirect":
                    html["Location"] = "/login"
                if isinstance(fault, int):
                    self.finish_with(fault, html, b"<html>no</html>")
                    return
                if fault in ("garbage", "redirect"):
                    self.finish_with(200 if fault == "garbage" else 302, html, b"<html>log in")
                    return
                if fault == "reset":
                    self.hang_up()
                    return
                if fault == "slow":
                    time.sleep(_SLOW_SECONDS)
                kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
                got = requests.request(
                    self.command,
                    f"{proxy._target}{self.path}",
                    data=body,
                    headers=kept,
                    timeout=60,
                    allow_redirects=False,
                )
                if fault == "lost":
                    self.hang_up()
                    return
                kind = {"Content-Type": got.headers.get("Content-Type", "text/plain")}
                self.finish_with(got.status_code, kind, got.content)

            def hang_up(self) -> None:
                # With no time to linger the other side gets a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.close_connection = True
                self.connection.close()

            def chunk(self) -> bytes:
                data = self.rfile.read(int(self.rfile.readline().strip() or b"0", 16))
                self.rfile.readline()
                return data

            def finish_with(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def hub_server(repositories: Mapping[str, Path]) -> Iterator[str]:
    """A hub on 127.0.0.1 with some repositories: `models/OWNER/NAME` or `datasets/...` -> folder.

    It has the addresses that huggingface_hub asks for; yields its own.
    """
    files = {
        name: {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        for name, folder in repositories.items()
    }
    commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in repositories}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            for name, listed in files.items():
                kind, _, repo = name.partition("/")
                own = repo if kind == "models" else name
                for revision in ("main", commits[name]):
                    if path == f"api/{name}/revision/{revision}":
                        about = {"id": repo, "sha": commits[name], "siblings": []}
                        return self._send(json.dumps(about).encode(), name, with_body)
                    if path == f"api/{name}/tree/{revision}":
                        tree = [
                            {"type": "file", "path": p, "size": f.stat().st_size, "oid": _oid(f)}
                            for p, f in listed.items()
                        ]
                        return self._send(json.dumps(tree).encode(), name, with_body)
                    wanted = path.removeprefix(f"{own}/resolve/{revision}/")
                    if wanted != path and wanted in listed:
                        file = listed[wanted]
                        return self._send(file.read_bytes(), name, with_body, _oid(file))
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, body: bytes, name: str, with_body: bool, oid: str = "x") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{oid}"')
            self.send_header("X-Repo-Commit", commits[name])
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _oid(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
