"""The metrics journal and its shipping, against a real store."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import NotShipped, TrackingError
from tunix_mlflow.tracking import journal
from tunix_mlflow.tracking.journal import Journal, Point, read, summary


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_DRAIN_SECONDS", 1.0)


def open_journal(path: Path, shipped: list[Point], reports: list[str]) -> Journal:
    return Journal(path, shipped.extend, reports.append)


def test_everything_arrives_in_order_and_once(tmp_path: Path) -> None:
    """Far more points than a batch holds."""
    shipped: list[Point] = []
    it = open_journal(tmp_path / "metrics.jsonl", shipped, [])
    for step in range(3000):
        it.write_scalars(step, {"train/loss": step / 7, "perf/x": 1.0})
    it.close()
    assert [(p.key, p.step) for p in shipped] == [
        (key, step) for step in range(3000) for key in ("train/loss", "perf/x")
    ]
    assert shipped[14].value == 1.0


def test_shipping_again_doubles_nothing_in_mlflow(store: str, tmp_path: Path) -> None:
    """A resumed run ships its whole journal; MLflow keeps each point once."""
    client = MlflowClient()
    run = client.create_run("0").info.run_id

    def ship(points: Sequence[Point]) -> None:
        client.log_batch(run, [Metric(p.key, p.value, p.timestamp, p.step) for p in points])

    for _ in range(3):
        it = Journal(tmp_path / "metrics.jsonl", ship, print)
        for step in range(50):
            it.write_scalars(step, {"train/loss": 1.0 / (step + 1)})
        it.close()
    history = client.get_metric_history(run, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1.0 / (s + 1)) for s in range(50)]


def test_an_outage_loses_nothing(tmp_path: Path) -> None:
    """A server that fails in between: every point arrives, and it is said once."""
    shipped: list[Point] = []
    reports: list[str] = []
    calls = iter([False, True, True, False])

    def ship(points: Sequence[Point]) -> None:
        if next(calls, False):
            raise ConnectionError("down")
        shipped.extend(points)

    it = Journal(tmp_path / "metrics.jsonl", ship, reports.append)
    for step in range(5):
        it.write_scalars(step, {"train/loss": float(step)})
        it.drain(5)
    it.close()
    assert [p.step for p in shipped] == list(range(5))
    assert len(reports) == 1
    assert "down" in reports[0]


@pytest.mark.usefixtures("quick")
def test_a_server_that_stays_away_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    """The file has everything, and the message says where it is."""

    def ship(points: Sequence[Point]) -> None:
        raise ConnectionError("gone")

    it = Journal(tmp_path / "metrics.jsonl", ship, lambda _: None)
    it.write_scalars(1, {"train/loss": 2.0})
    with pytest.raises(NotShipped, match=r"1 metric points .*metrics.jsonl"):
        it.close()
    assert read(tmp_path / "metrics.jsonl")[-1]["metrics"] == {"train/loss": 2.0}


def test_a_resumed_run_repeats_in_silence_and_reports_a_difference(tmp_path: Path) -> None:
    """The same values are not written again; another one is lost determinism; perf may differ."""
    path, reports = tmp_path / "metrics.jsonl", list[str]()
    first = open_journal(path, [], reports)
    for step in range(4):
        first.write_scalars(step, {"train/loss": float(step), "perf/ms": 1.0})
    first.close()
    second = open_journal(path, [], reports)
    second.write_scalars(2, {"train/loss": 2.0, "perf/ms": 9.0})
    assert reports == []
    second.write_scalars(3, {"train/loss": 3.5, "perf/ms": 9.0})
    second.write_scalars(4, {"train/loss": 4.0})
    second.close()
    assert len(reports) == 1
    assert "train/loss at step 3: 3.0, now 3.5" in reports[0]
    points = [line for line in read(path) if "metrics" in line]
    assert [line["step"] for line in points] == [0, 1, 2, 3, 4]
    assert points[3]["metrics"]["train/loss"] == 3.0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 400))
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    """Wherever the file ends, the whole lines before it are read, and writing goes on."""
    path = tmp_path / "metrics.jsonl"
    metrics = {"train/loss": 0.5}
    lines = [json.dumps({"step": s, "timestamp": s, "metrics": metrics}) for s in range(5)]
    data = ("\n".join(lines) + "\n").encode()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    it = open_journal(path, [], [])
    it.write_scalars(99, {"train/loss": 1.0})
    it.close()
    found = [line["step"] for line in read(path) if "step" in line]
    assert found == [*range(whole), 99]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    """File and line."""
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrackingError, match=r"m.jsonl:2 is damaged"):
        read(tmp_path / "m.jsonl")


def test_summary_sums_over_resumed_parts() -> None:
    """Two parts with a gap between them, and a step that both of them did once."""
    lines = [
        {"part": 1, "timestamp": 1_000},
        {"step": 1, "timestamp": 2_000, "metrics": {"train/loss": 3.0, "train/tokens": 10}},
        {
            "step": 2,
            "timestamp": 3_000,
            "metrics": {"train/loss": 1.0, "train/tokens": 20, "perf/step_time_ms": 100.0},
        },
        {"part": 2, "timestamp": 100_000},
        {
            "step": 3,
            "timestamp": 104_000,
            "metrics": {"train/loss": 2.0, "train/tokens": 40, "perf/step_time_ms": 200.0},
        },
    ]
    assert summary(lines) == {
        "final_loss": 2.0,
        "best_loss": 1.0,
        "total_steps": 3.0,
        "total_tokens": 70,
        "avg_throughput": pytest.approx(60 / 0.3),
        "wall_time": 6.0,
    }
    assert summary([]) == {}


def test_nan_is_kept_as_it_is(tmp_path: Path) -> None:
    """A foreign loop may write one; it is not equal to itself, and is no difference."""
    reports: list[str] = []
    for _ in range(2):
        it = open_journal(tmp_path / "metrics.jsonl", [], reports)
        it.write_scalars(1, {"train/loss": math.nan})
        it.close()
    assert reports == []
