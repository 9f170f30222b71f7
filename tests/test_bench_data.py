"""The data suite measures what it says."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import data


def test_every_stage_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are positive, ratios are of their parts, and the table names every stage."""
    shared, scratch = tmp_path / "shared", tmp_path / "scratch"
    shared.mkdir()
    scratch.mkdir()
    monkeypatch.setenv(paths.SNAPSHOTS_VARIABLE, str(shared))
    reported: list[str] = []
    figures = data.measure(scratch, traces=2_000, peer_traces=500, report=reported.append)
    assert all(value > 0 for value in figures.values())
    for clock in ("wall", "cpu"):
        runs = [figures[f"floor_{n}_{clock}_s"] for n in (1, 2, 3)]
        assert figures[f"floor_{clock}_s"] == statistics.median(runs)
        for name in data.STAGES:
            ratio = figures[f"{name}_{clock}_s"] / figures[f"floor_{clock}_s"]
            assert figures[f"{name}_{clock}_over_floor"] == ratio
    for name in data.STAGES:
        ours = 1e6 * figures[f"{name}_cpu_s"] / 2_000
        ratio = figures[f"seed_{name}_cpu_us_per_trace"] / ours
        assert figures[f"seed_over_ours_cpu_{name}"] == pytest.approx(ratio)
        assert f"| {name.replace('_', ' ')} |" in data.table(figures)
        assert any(line.startswith(f"{name}:") for line in reported)
    assert not list(shared.iterdir())  # a user's shared snapshots are not written to


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_the_childs_own(tmp_path: Path) -> None:
    """A parent that held much memory does not show in a stage's peak."""
    data.generate(tmp_path / "traces.jsonl", 10)
    held = bytearray(b"1") * 800_000_000
    figures = data.run_in_child("floor", tmp_path / "traces.jsonl", tmp_path)
    assert figures["peak_mb"] < len(held) / 1e6


def test_the_traces_are_the_same_each_time(tmp_path: Path) -> None:
    """Otherwise two runs could not be compared."""
    for name in ("a", "b"):
        data.generate(tmp_path / name, 500)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 600 < (tmp_path / "a").stat().st_size / 500 < 900
