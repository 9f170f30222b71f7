"""The metrics metrics log: what is written once, read again, compared and merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking.record.metrics_log import MetricsLog, Point, merge, points, read, summary


def open_log(path: Path, reports: list[str]) -> MetricsLog:
    return MetricsLog(path, reports.append)


def test_a_resumed_run_repeats_in_silence_and_reports_a_difference(tmp_path: Path) -> None:
    """The same values are not written again; another one is lost determinism; perf may differ, and
    a metric of the user's own is recorded as they say it."""
    path, reports = tmp_path / "metrics.jsonl", list[str]()
    first = open_log(path, reports)
    for step in range(4):
        first.log_metrics({"train/loss": float(step), "perf/ms": 1.0, "own": 1.0}, step)
    first.close()
    second = open_log(path, reports)
    second.log_metrics({"train/loss": 2.0, "perf/ms": 9.0, "own": 1.0}, 2)
    assert reports == []
    second.log_metrics({"train/loss": 3.5, "perf/ms": 9.0, "own": 5.0}, 3)
    second.log_metrics({"train/loss": 4.0}, 4)
    second.close()
    assert len(reports) == 1
    assert "train/loss at step 3: 3.0, now 3.5" in reports[0]
    found = [line for line in read(path) if "metrics" in line]
    assert [line["step"] for line in found] == [0, 1, 2, 3, 3, 4]
    assert found[3]["metrics"]["train/loss"] == 3.0
    assert found[4]["metrics"] == {"own": 5.0}


def test_points_of_two_models_are_two(tmp_path: Path) -> None:
    """After a resume too: a point is the same if key, step, model and dataset are."""
    for model in ("m-a", "m-b", "m-b"):
        log = MetricsLog(tmp_path / "metrics.jsonl", pytest.fail)
        log.log_metrics({"eval/score": 0.5}, 1, model_id=model)
        log.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["model_id"] for line in lines if "metrics" in line] == ["m-a", "m-b"]


def test_within_a_process_every_point_counts(tmp_path: Path) -> None:
    """As in MLflow: two values at one step are two points."""
    log = open_log(tmp_path / "metrics.jsonl", [])
    log.log_metrics({"a": 1.0}, 0)
    log.log_metrics({"a": 2.0}, 0, 7, "m-1", ("data/test", "abc"))
    log.close()
    found = [p for line in read(tmp_path / "metrics.jsonl") for p in points(line)]
    assert [p.value for p in found] == [1.0, 2.0]
    assert found[1] == Point("a", 2.0, 7, 0, "m-1", ("data/test", "abc"))


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
    it = open_log(path, [])
    it.log_metrics({"train/loss": 1.0}, 99)
    it.close()
    found = [line["step"] for line in read(path) if "step" in line]
    assert found == [*range(whole), 99]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    """File and line."""
    (tmp_path / "m.jsonl").write_text('{"part": 1}\nnonsense\n{"part": 2}\n')
    with pytest.raises(TrackingError, match=r"m.jsonl:2 is damaged"):
        read(tmp_path / "m.jsonl")


def test_summary_sums_over_resumed_parts() -> None:
    """Two parts with a gap between them, and a step that both of them did once."""
    lines: list[dict[str, Any]] = [
        {"part": 1, "timestamp": 1_000},
        {"step": 1, "timestamp": 2_000, "metrics": {"train/loss": 3.0, "train/tokens": 10}},
        {
            "step": 2,
            "timestamp": 3_000,
            "metrics": {"train/loss": 1.0, "train/tokens": 20, "train_perf/step_time_ms": 100.0},
        },
        {"part": 2, "timestamp": 100_000},
        {
            "step": 3,
            "timestamp": 104_000,
            "metrics": {"train/loss": 2.0, "train/tokens": 40, "train_perf/step_time_ms": 200.0},
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
        it = open_log(tmp_path / "metrics.jsonl", reports)
        it.log_metrics({"train/loss": math.nan}, 1)
        it.close()
    assert reports == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_merging_adds_what_is_missing_and_nothing_else(
    tmp_path: Path, here: set[int], there: set[int]
) -> None:
    """Points that both have keep the file's line; the rest comes with MLflow's timestamp, once."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": s, "timestamp": 10 * s, "metrics": {"train/loss": float(s)}}) + "\n"
            for s in sorted(here)
        )
    )
    known = [Point("train/loss", float(s), 10 * s, s) for s in there]
    assert merge(path, known) == len(there - here)
    assert merge(path, known) == 0
    found = [p for line in read(path) for p in points(line)]
    assert [(p.step, p.timestamp) for p in found] == [(s, 10 * s) for s in sorted(here | there)]
