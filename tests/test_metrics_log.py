"""The metrics journal: what is written once, read again, compared and merged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking.record.metrics_log import MetricsLog, Point, merge, points, read, summary


def open_journal(path: Path, reports: list[str]) -> MetricsLog:
    return MetricsLog(path, reports.append)


def test_a_resumed_run_repeats_in_silence_and_reports_a_difference(tmp_path: Path) -> None:
    """The same values are not written again; another one is lost determinism; perf may differ."""
    path, reports = tmp_path / "metrics.jsonl", list[str]()
    first = open_journal(path, reports)
    for step in range(4):
        first.write_scalars(step, {"train/loss": float(step), "perf/ms": 1.0})
    first.close()
    second = open_journal(path, reports)
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
    it = open_journal(path, [])
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
        it = open_journal(tmp_path / "metrics.jsonl", reports)
        it.write_scalars(1, {"train/loss": math.nan})
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
