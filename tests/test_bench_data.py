"""The data suite measures what it says."""

from __future__ import annotations

from pathlib import Path

from tunix_mlflow.benchmarks import data


def test_every_stage_is_measured(tmp_path: Path) -> None:
    """Figures are positive, ratios are of their parts, and the table names every stage."""
    figures = data.measure(tmp_path, traces=1_000, peer_traces=300, say=lambda line: None)
    assert all(value > 0 for value in figures.values())
    for name in data.STAGES:
        ratio = figures[f"{name}_wall_s"] / figures["floor_wall_s"]
        assert figures[f"{name}_wall_over_floor"] == ratio
        assert f"| {name.replace('_', ' ')} |" in data.table(figures)


def test_the_traces_are_the_same_each_time(tmp_path: Path) -> None:
    """Otherwise two runs could not be compared."""
    for name in ("a", "b"):
        data.generate(tmp_path / name, 500)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 600 < (tmp_path / "a").stat().st_size / 500 < 900
