"""The suites of `bench`, each on a tiny shape: what they count, and that their parts fit."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import jax
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, as_arguments, last_json, tiny
from tunix_mlflow.benchmarks import compare, peers, scale, startup, tracking, workload
from tunix_mlflow.benchmarks.contenders import task as tasks
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import BenchmarkError
from tunix_mlflow.models import decoder

Command = Callable[..., subprocess.CompletedProcess[str]]
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
    return load_config("shape-s", overrides, ROOT / "projects" / "configs")


def test_contenders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours three times, in processes of their own: equal work gives equal losses, packing more
    useful tokens an update, and every repeat counts."""
    chosen = [c for c in peers.CONTENDERS if c.name in ("ours", "ours, cpu-fast", "ours, packed")]
    monkeypatch.setattr(peers, "CONTENDERS", (*chosen, peers.CONTENDERS[6]))
    heard: list[str] = []
    plain, fast, packed, single = peers.measure(
        small(data__sequence_length="256"), tmp_path, Path(sys.executable), heard.append
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


def test_a_contender_that_fails_is_named(tmp_path: Path) -> None:
    """With its last words."""
    (tmp_path / "full").mkdir()
    with pytest.raises(BenchmarkError, match=r"PeftTrainer failed, exit code 1: No such file"):
        peers.Racer(peers.PEFT_TRAINER, tmp_path, _broken(tmp_path))


def test_a_contender_that_dies_while_it_waits_is_named(tmp_path: Path) -> None:
    """Killed between two turns."""
    config = small()
    (tmp_path / "full").mkdir()
    tasks.write(tmp_path / "full", peers.task(config, "full"))
    peers.write_configs(config, tmp_path)
    racer = peers.Racer(peers.OURS, tmp_path, Path(sys.executable))
    racer._process.kill()
    with pytest.raises(BenchmarkError, match="ours failed, exit code -9"):
        racer.turn()
    racer.stop()


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
    """Four of five tokens follow from the one before; lengths as asked."""
    made = workload.documents("mix", 200, 256, 64)
    lengths = [len(d) for d in made]
    assert 8 <= min(lengths) < max(lengths) <= 256
    assert 60 < np.median(lengths) < 100
    pairs = [(int(a), int(b)) for d in made for a, b in itertools.pairwise(d)]
    best: dict[int, dict[int, int]] = {}
    for a, b in pairs:
        best.setdefault(a, {}).setdefault(b, 0)
        best[a][b] += 1
    hits = sum(max(found.values()) for found in best.values())
    assert 0.75 < hits / len(pairs) < 0.9


@pytest.mark.parametrize("suite", ["tracking", "checkpoint"])
def test_what_surrounds_a_step(store: str, command: Command, suite: str) -> None:
    """Costs are found, and their repeats lie in MLflow."""
    words = as_arguments(SMALL)
    done = command("tunix-mlflow", "bench", "shape-s", f"suite={suite}", *words)
    assert done.returncode == 0, done.stderr
    figures = last_json(done.stdout)
    assert figures["suite"] == suite
    assert compare.repeats(MlflowClient(), figures["run_id"]) == figures["repeats"]
    assert len(figures["repeats"]["step_ms"]) == 2
    if suite == "tracking":
        assert 0 < figures["write_ms"] < figures["step_ms"]
        history = MlflowClient().get_metric_history(figures["run_id"], "train/loss")
        assert len(history) == 3 * 2
    else:
        assert figures["megabytes"] > 0
        assert 0 < figures["blocked_ms"] < figures["sealed_ms"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=tracking", "benchmark.delay_ms=50"], "needs a tracking server at http://"),
        (["suite=peers", "benchmark.peers_python=/nowhere"], "the peers' environment is missing"),
        (["suite=startup", "benchmark.peers_python=/nowhere"], "the peers' environment is missing"),
        (["suite=speed"], "benchmark.suite"),
    ],
)
def test_a_mistake_is_one_line(
    store: str, command: Command, words: list[str], message: str
) -> None:
    """Exit code 2, and no run."""
    done = command("tunix-mlflow", "bench", "shape-s", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    experiments = [e.experiment_id for e in MlflowClient().search_experiments()]
    assert MlflowClient().search_runs(experiments) == []


def test_a_server_further_away() -> None:
    """It answers the same, so much later."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    with tracking.away(f"http://127.0.0.1:{server.server_port}", 200) as address:
        begun = time.perf_counter()
        with urllib.request.urlopen(address) as reply:
            assert reply.read() == b"here"
        assert time.perf_counter() - begun > 0.2
    server.shutdown()
    server.server_close()


def test_a_forecast_of_more_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsdp halves the state; data copies it; gradients are reduced once."""
    monkeypatch.setattr(scale, "COUNTS", (1, 2))
    one, copied, spread = scale.measure(small(), lambda _: None)
    assert one.collectives == {}
    assert copied.state_bytes == one.state_bytes
    assert spread.state_bytes < 0.6 * one.state_bytes
    params = sum(leaf.size for leaf in jax.tree.leaves(_params()))
    assert copied.collectives["all-reduce"] >= 1
    assert 4 * params <= copied.collective_bytes <= 4.1 * params
    assert set(spread.collectives) >= {"all-gather", "reduce-scatter"}
    assert one.flops == pytest.approx(copied.flops, rel=0.01)


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
    without = startup._imports(startup._WITHOUT)
    added = {name for name in startup._imports(startup._WITH) if name not in without}
    assert added
    assert all(name.startswith("tunix_mlflow") for name in added)
    assert startup.plugins() > 0
