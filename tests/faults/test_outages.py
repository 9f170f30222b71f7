"""A tracking server that is down, flaps, hangs or fails: nothing is lost, nothing doubled.

Quick by default; with TUNIX_FAULTS=50 or more the outages last a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BIN, as_arguments, tiny
from tests.servers import Server, end, free_port, launch
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.record.cursor import Cursor, pending_bytes, read_cursor, update_cursor
from tunix_mlflow.tracking.record.folder import read_link
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.sync import worker
from tunix_mlflow.tracking.sync.delivery import LANES, Delivery

LONG = int(os.environ.get("TUNIX_FAULTS", "4")) >= 50
SECONDS = 60.0 if LONG else 3.0
QUIET = TrackingConfig(system_metrics=False)
KEYS = ("train/loss", "train/grad_norm", "train/learning_rate", "train_perf/step_time_ms")


class Proxy:
    """A port in front of a server that does as it is told: pass, down, hang or 500."""

    def __init__(self, target: int) -> None:
        self.port, self._target, self._mode = free_port(), target, "down"
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def be(self, mode: str, *, keep_connections: bool = False) -> None:
        """Change; end the connections that there are, or leave them as they are."""
        self._mode = mode
        listener, self._listener = self._listener, None
        for old in [listener, *([] if keep_connections else self._sockets)]:
            if old is not None:
                with contextlib.suppress(OSError):
                    old.shutdown(socket.SHUT_RDWR)
                old.close()
        if not keep_connections:
            self._sockets = []
        if mode != "down":
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                if listener is not self._listener:  # told to be something else meanwhile
                    client.close()
                    return
                self._sockets.append(client)
                if self._mode == "pass":
                    server = socket.create_connection(("127.0.0.1", self._target))
                    self._sockets.append(server)
                    for a, b in ((client, server), (server, client)):
                        threading.Thread(target=self._copy, args=(a, b), daemon=True).start()
                elif self._mode == "500":
                    threading.Thread(target=self._fail, args=(client,), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    @staticmethod
    def _fail(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.recv(65536)
            client.sendall(
                b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n"
                b"Connection: close\r\n\r\n{}"
            )
            client.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    it = Proxy(server.port)
    mlflow.set_tracking_uri(it.uri)
    mlflow.set_registry_uri(it.uri)
    yield it
    it.be("down")
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


class Loop:
    """Steps of some milliseconds that write four metrics each."""

    def __init__(self) -> None:
        self.step = 0
        self.took: list[float] = []

    def go(self, run: Run, seconds: float) -> float:
        """Median milliseconds of one write in that time."""
        until, before = time.monotonic() + seconds, len(self.took)
        while time.monotonic() < until:
            self.step += 1
            begun = time.perf_counter()
            run.log_metrics(dict.fromkeys(KEYS, self.step / 7), self.step)
            self.took.append(1000 * (time.perf_counter() - begun))
            time.sleep(0.01)
        return statistics.median(self.took[before:])


def assert_all_there(client: MlflowClient, run_id: str, steps: int) -> None:
    """Every point of every step, once, with its value."""
    for key in KEYS:
        found = sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        assert found == [(step, step / 7) for step in range(1, steps + 1)]


def _cursor(wanted: Cursor, _: Cursor) -> Cursor:
    return wanted


@pytest.mark.parametrize("fault", ["down", "flapping", "hang", "500"])
def test_an_outage_loses_and_doubles_nothing(
    proxy: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The loop continues, the user is told, and everything arrives before the run ends. Nothing is
    printed but to `report`."""
    if not LONG:
        monkeypatch.setattr(worker, "INTERVAL_SECONDS", 0.5)
        monkeypatch.setattr(worker, "SILENT_SECONDS", 1.0)
    proxy.be("pass")
    reports: list[tuple[float, str]] = []
    loop = Loop()
    with open_run(
        stage="train",
        tracking=QUIET,
        report=lambda m: reports.append((time.monotonic(), m)),
    ) as run:
        calm = loop.go(run, 1.0)
        began = time.monotonic()
        if fault == "flapping":
            shaken = []
            while time.monotonic() - began < SECONDS:
                for mode in ("down", "pass", "500", "pass"):
                    proxy.be(mode)
                    shaken.append(loop.go(run, 0.4))
            stormy = statistics.median(shaken)
        else:
            proxy.be(fault)
            stormy = loop.go(run, SECONDS)
            while not reports:  # a busy machine
                loop.go(run, 0.1)
        proxy.be("pass")
        loop.go(run, 1.0)
    assert capfd.readouterr() == ("", "")
    client = MlflowClient()
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert_all_there(client, run.run_id, loop.step)
    said = [(at - began, message) for at, message in reports]
    if fault != "flapping":
        # A busy machine may fall silent once more while it catches up.
        kinds = [m.partition(" (")[0].partition(":")[0] for _, m in said]
        assert kinds[:2] == ["MLflow does not answer", "MLflow answers again"]
        assert kinds == kinds[:2] * (len(kinds) // 2)
        print(f"{fault}: said after {said[0][0]:.1f} s; ", end="")
    points = loop.step * len(KEYS)
    print(
        f"{fault}: 0 of {points} points lost, 0 doubled; a write took {calm:.3f} ms before,"
        f" {stormy:.3f} ms meanwhile (medians)"
    )


def test_a_request_without_an_answer_is_sent_again(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends while a request hangs whose connection nobody closes, as behind a network that
    drops packets: the server answers others, so the end of the run waits until it has timed out."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(worker, "INTERVAL_SECONDS", 0.2)
    proxy.be("pass")
    loop, reports = Loop(), list[str]()
    with open_run(stage="train", tracking=QUIET, report=reports.append) as run:
        loop.go(run, 0.5)
        proxy.be("down")
        loop.go(run, 1.0)
        proxy.be("hang")
        loop.go(run, 2.0)
        proxy.be("pass", keep_connections=True)
    assert "sync" not in "".join(reports)
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert_all_there(MlflowClient(), run.run_id, loop.step)


def test_a_server_dead_from_the_start(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is recorded here; MLflow gets all of it when it is uploaded, and only once."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 1.0)
    loop, reports = Loop(), list[str]()
    with open_run(stage="train", tracking=QUIET, report=reports.append) as run:
        loop.go(run, 2.0)
        run.log_text("hello", "notes/a.txt")
    assert not read_link(run.folder)
    proxy.be("pass")
    client = MlflowClient()
    lanes = [Delivery(client, run.folder, lane, reports.append) for lane in LANES]
    while pending_bytes(run.folder):  # as many processes that die after each delivery
        for lane in lanes:
            at = read_cursor(run.folder)
            lane.deliver_next()
            update_cursor(run.folder, partial(_cursor, at))
            lane.deliver_next()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert_all_there(client, run.run_id, loop.step)
    assert (
        len(client.search_runs([found.info.experiment_id], "tags.`tunix_mlflow.local_id` != ''"))
        == 1
    )
    assert [f.path for f in client.list_artifacts(run.run_id, "notes")] == ["notes/a.txt"]
    assert not [r for r in reports if "not recorded" in r]


def test_a_server_that_dies_as_a_run_begins(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answered when it was asked for, and is gone when the run is to be made."""
    proxy.be("pass")
    reach, loop, reports = store.reach, Loop(), list[str]()

    def then_down(config: TrackingConfig) -> tuple[MlflowClient, str | None]:
        found = reach(config)
        proxy.be("down")
        return found

    monkeypatch.setattr(store, "reach", then_down)
    with open_run(stage="train", tracking=QUIET, report=reports.append) as run:
        assert "went away" in reports[0]
        loop.go(run, 1.0)
        proxy.be("pass")
    assert_all_there(MlflowClient(), run.run_id, loop.step)
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_a_run_goes_on_when_the_server_comes_back(proxy: Proxy, tmp_path: Path) -> None:
    """Dead at the start and alive at the end: nothing is left to do by hand."""
    loop, reports = Loop(), list[str]()
    with open_run(stage="train", tracking=QUIET, report=reports.append) as run:
        local = run.run_id
        loop.go(run, 1.0)
        proxy.be("pass")
        loop.go(run, 3.0)
    assert run.run_id != local
    assert_all_there(MlflowClient(), run.run_id, loop.step)
    assert "sync" not in "".join(reports)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["down", "hang", "500"])
def test_an_outage_does_not_slow_the_loop(proxy: Proxy, tmp_path: Path, fault: str) -> None:
    """Steps of a real training while the server is away, beside those while it is there."""
    proxy.be("pass")
    journal, log = tmp_path / "home" / "runs", tmp_path / "log"
    shape = {"model__width": "128", "model__mlp_width": "352", "checkpoints__upload": "false"}
    never = {"training__save_every_steps": "0", "training__eval_every_steps": "0"}
    words = as_arguments(tiny(training__steps="1000000", **shape, **never))
    process = launch(
        [str(BIN / "tunix-mlflow"), "train", "golden-v2", *words],
        log,
        {"MLFLOW_TRACKING_URI": proxy.uri},
    )
    spans: list[tuple[str, float, float]] = []
    try:
        while not list(journal.glob("*/metrics.jsonl")) or len(steps_of(journal)) < 50:
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        for _ in range(6):
            for mode in ("pass", fault):
                proxy.be(mode)
                time.sleep(1.0)  # what was under way is over
                began = time.time()
                time.sleep(6.0)
                spans.append((mode, began, time.time()))
        proxy.be("pass")
    finally:
        end(process)
    taken = steps_of(journal)
    pairs = []
    for (_, a, b), (_, c, d) in zip(spans[::2], spans[1::2], strict=True):
        calm = [ms for at, ms in taken if a <= at <= b]
        stormy = [ms for at, ms in taken if c <= at <= d]
        pairs.append(statistics.median(stormy) / statistics.median(calm))
    ratio = statistics.median(pairs)
    typical = statistics.median(ms for _, ms in taken)
    print(
        f"{fault}: a step of {typical:.1f} ms took {ratio:.3f} of its time meanwhile"
        f" (median of 6 pairs, {min(pairs):.3f} to {max(pairs):.3f})"
    )
    assert ratio < 1.1


def steps_of(journals: Path) -> list[tuple[float, float]]:
    """(seconds since 1970, milliseconds) of each step in the only journal."""
    (path,) = journals.glob("*/metrics.jsonl")
    lines = [
        json.loads(raw)
        for raw in path.read_bytes().splitlines(keepends=True)
        if raw.endswith(b"\n")
    ]
    key = "train_perf/step_time_ms"
    return [
        (x["timestamp"] / 1000, x["metrics"][key]) for x in lines if key in x.get("metrics", {})
    ]
