"""Installed as users install it. Downloads everything: `make test-install`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, as_arguments, as_parameters, last_json, tiny, write_traces
from tunix_mlflow.version import __version__

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.install
SMALL = tiny(dataset="golden-v2", promotion__thresholds__exact_match="0")


def test_uv_builds_the_environment(store: str, command: Command, tmp_path: Path) -> None:
    """`mlflow run --env-manager uv`, with nothing cached by MLflow, from another folder."""
    done = command(
        *("mlflow", "run", str(ROOT), "-e", "train", "--env-manager", "uv"),
        *as_parameters(SMALL),
        env={"HOME": str(tmp_path)},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_json(done.stdout)["total_steps"] == 4


def test_the_wheel_is_enough(tmp_path: Path) -> None:
    """In an empty environment and an empty folder, the demo runs, and writes ./.demo alone; so does
    the script of the docs on a user's own file."""
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*words, str(ROOT)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"tunix_mlflow-{__version__}-")
    assert "tunix_mlflow/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "-q", str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [str(venv / "bin" / "tunix-mlflow"), "demo", *as_arguments(SMALL)],
        cwd=empty,
        env={**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["version"] == "1"
    assert [p.name for p in empty.iterdir()] == [".demo"]
    own = tmp_path / "own"
    own.mkdir()
    write_traces(own / "own.jsonl", 60)
    home = {"HOME": str(tmp_path / "home"), "TUNIX_MLFLOW_HOME": str(tmp_path / "state")}
    home |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(venv / "bin" / "python"), str(ROOT / "docs" / "own_data.py"), "own.jsonl", "support"],
        cwd=own,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "support version 1: promoted, the first" in done.stdout
    assert [p.name for p in own.iterdir()] == ["own.jsonl"]
