"""The suites of `bench`, each on a tiny shape: what they count, and that their parts fit."""

from __future__ import annotations

import itertools
import os
import sys
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread

import jax
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import run_here, tiny
from tunix_mlflow.benchmarks import compare, peers, run, scale, startup, tracking, workload
from tunix_mlflow.benchmarks.peer_process import PeerProcess
from tunix_mlflow.benchmarks.trainers import task as tasks
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import BenchmarkError
from tunix_mlflow.models import decoder

CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
SMALL = tiny(
    training__batch_size="4",
    data__sequence_length="64",
    benchmark__vocabulary="64",
    benchmark__steps="2",
    benchmark__repeats="2",
    benchmark__warmup_steps="1",
)


def small(**more: str) -> Config:
    overrides = SMALL | {key.replace("__", "."): value for key, value in more.items()}
    return load_config("shape-s", overrides)


def test_trainers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours three times, in processes of their own: equal work gives equal losses, packing more
    useful tokens an update, and every repeat counts."""
    wanted = ("ours", "ours, cpu-fast", "ours, packed", "ours, one a row")
    monkeypatch.setattr(peers, "PEERS", [peer for peer in peers.PEERS if peer.name in wanted])
    # The same step is compiled once; a benchmark gives each process a cache of its own.
    monkeypatch.setattr(peers, "PeerProcess", partial(PeerProcess, cache=CACHE))
    reported: list[str] = []
    plain, fast, packed, single = peers.measure(
        small(data__sequence_length="256"), tmp_path, Path(sys.executable), reported.append
    )
    assert len(plain.useful_per_sec) == 2
    assert len(plain.losses) == 1 + 2 * (1 + 2) + 1
    assert np.allclose(plain.losses, fast.losses, atol=1e-4)
    assert packed.useful_per_sec[0] * packed.step_seconds[0] > (
        1.2 * single.useful_per_sec[0] * single.step_seconds[0]
    )
    assert plain.useful_per_sec[0] * plain.step_seconds[0] == pytest.approx(4 * 255)
    table = peers.table([plain, fast, packed, single])
    assert len(table.splitlines()) == 2 + 4
    peers.plot([plain, fast], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert peers.ratio([plain, fast], fast, "ours") == pytest.approx(
        np.median(np.divide(fast.useful_per_sec, plain.useful_per_sec))
    )


def test_a_trainer_that_fails_is_named(tmp_path: Path) -> None:
    """With the last line of its output."""
    (tmp_path / "full").mkdir()
    with pytest.raises(BenchmarkError, match=r"PeftTrainer failed, exit code 1: No such file"):
        PeerProcess(peers.PEFT_TRAINER, tmp_path, _broken(tmp_path))


def test_a_trainer_that_dies_while_it_waits_is_named(tmp_path: Path) -> None:
    """Killed between two turns."""
    config = small(data__sequence_length="256")
    (tmp_path / "full").mkdir()
    tasks.write(tmp_path / "full", peers.task(config, "full"))
    peers.write_configs(config, tmp_path)
    process = PeerProcess(peers.OURS, tmp_path, Path(sys.executable), CACHE)
    process._process.kill()
    with pytest.raises(BenchmarkError, match="ours failed, exit code -9"):
        process.turn()
    process.stop()


def _broken(folder: Path) -> Path:
    path = folder / "python"
    path.write_text("#!/bin/sh\necho No such file >&2\nexit 1\n")
    path.chmod(0o755)
    return path


def test_a_task_is_read_as_written(tmp_path: Path) -> None:
    """Documents, order and weights, and batches of one document a row."""
    task = peers.task(small(), "mix")
    tasks.write(tmp_path, task)
    again = tasks.read(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(task.documents, again.documents, strict=True))
    assert again.weights.keys() == task.weights.keys()
    tokens, real = tasks.padded(again, 3)
    first = task.documents[task.order[3][0]]
    assert np.array_equal(tokens[0][real[0]], first)
    assert again.steps == task.stops[-1] + 1


def test_documents_can_be_learnt() -> None:
    """Four of five tokens follow from the one before; lengths as specified."""
    documents = workload.documents("mix", 200, 256, 64)
    lengths = [len(d) for d in documents]
    assert 8 <= min(lengths) < max(lengths) <= 256
    assert 60 < np.median(lengths) < 100
    pairs = [(int(a), int(b)) for d in documents for a, b in itertools.pairwise(d)]
    successors: dict[int, dict[int, int]] = {}
    for a, b in pairs:
        successors.setdefault(a, {}).setdefault(b, 0)
        successors[a][b] += 1
    hits = sum(max(counts.values()) for counts in successors.values())
    assert 0.75 < hits / len(pairs) < 0.9


@pytest.mark.parametrize("suite", ["tracking", "checkpoint"])
def test_what_surrounds_a_step(store: str, capfd: pytest.CaptureFixture[str], suite: str) -> None:
    """Costs are measured, their repeats are in MLflow, and a suite prints nothing."""
    figures = run.run(small(benchmark__suite=suite))
    assert capfd.readouterr() == ("", "")
    assert figures["suite"] == suite
    assert compare.repeats(MlflowClient(), figures["run_id"]) == figures["repeats"]
    assert len(figures["repeats"]["step_ms"]) == 2
    if suite == "tracking":
        assert figures["write_ms"] > 0
        history = MlflowClient().get_metric_history(figures["run_id"], "train/loss")
        assert len(history) == 3 * 2
    else:
        assert figures["megabytes"] > 0
        assert min(figures["blocked_ms"], figures["sealed_ms"], figures["restore_ms"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=tracking", "benchmark.delay_ms=50"], "needs a tracking server at http://"),
        (["suite=peers", "benchmark.peers_python=/nowhere"], "the peers' environment is missing"),
        (["suite=startup", "benchmark.peers_python=/nowhere"], "the peers' environment is missing"),
        (["suite=speed"], "'speed' is not one of 'train'"),
    ],
)
def test_a_mistake_is_one_line(
    store: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Exit code 2, and no run."""
    assert run_here("bench", "shape-s", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    experiments = [e.experiment_id for e in MlflowClient().search_experiments()]
    assert MlflowClient().search_runs(experiments) == []


def test_threads_of_a_run_are_identified() -> None:
    """Those that were started since; their processor time is the delivery's."""
    before, end = tracking.thread_ids(), Event()
    thread = Thread(target=end.wait, daemon=True)
    thread.start()
    assert tracking.thread_ids() - before == {thread.native_id}
    end.set()
    thread.join()


def test_a_delayed_server() -> None:
    """It answers the same, later by the delay."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"answer")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    with tracking.delayed_server(f"http://127.0.0.1:{server.server_port}", 200) as address:
        start = time.perf_counter()
        with urllib.request.urlopen(address) as reply:
            assert reply.read() == b"answer"
        assert time.perf_counter() - start > 0.2
    server.shutdown()
    server.server_close()


def test_a_forecast_of_more_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsdp halves the state; data replicates it; gradients are reduced once."""
    monkeypatch.setattr(scale, "COUNTS", (1, 2))
    single, replicated, sharded = scale.measure(small(), lambda _: None)
    assert single.collectives == {}
    assert replicated.state_bytes == single.state_bytes
    assert sharded.state_bytes < 0.6 * single.state_bytes
    params = sum(leaf.size for leaf in jax.tree.leaves(_params()))
    assert replicated.collectives["all-reduce"] >= 1
    assert 4 * params <= replicated.collective_bytes <= 4.1 * params
    assert set(sharded.collectives) >= {"all-gather", "reduce-scatter"}
    assert single.flops == pytest.approx(replicated.flops, rel=0.01)


def _params() -> decoder.Params:
    config = small()
    return decoder.shape(config.model, config.benchmark.vocabulary)[1]


def test_collectives_are_counted() -> None:
    """Tuples too, by the bytes of their results."""
    text = """
      %a = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={}
      ROOT %b = f32[8]{0} all-gather(%z), dimensions={0}
      %c = f32[8]{0} add(%b, %b)
    """
    assert scale.collectives(text) == ({"all-reduce": 1, "all-gather": 1}, 24 + 8 + 32)


def test_plugins_load_nothing_but_themselves() -> None:
    """What `import mlflow` loads because of us."""
    added = startup.plugin_imports()
    assert all(name.startswith("tunix_mlflow") for name in added)
    assert sum(added.values()) > 0
