"""Models and datasets by their names on a hub: fetched, recorded by commit, used without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import as_arguments, last_json, tiny, write_traces
from tests.servers import hub_server
from tests.test_pretrained_runs import written

SECRET = "hf_abcdefsecret"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    data = folder / "data"
    data.mkdir()
    write_traces(data / "train-00000-of-00001.jsonl", 60)
    write_traces(data / "test-00000-of-00001.jsonl", 12, start=500)
    (data / "README.md").write_text("not data")
    model = written(folder / "model")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    return {"models/them/small": model, "datasets/them/doubles": data}


@pytest.fixture
def environment(tmp_path: Path, store: str) -> dict[str, str]:
    """Of a process that has a cache of its own."""
    (tmp_path / "hf").mkdir()
    given = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **given, "MLFLOW_TRACKING_URI": store}


def ours(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    code = "from tunix_mlflow.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_model_and_a_dataset(
    repositories: Mapping[str, Path], environment: dict[str, str], tmp_path: Path
) -> None:
    """Ingested, trained on, resumed while the hub is away, and exported; the token is nowhere."""
    small = tiny(dataset="doubles-v1", base="hf://them/small", training__steps="3")
    words = as_arguments({k: v for k, v in small.items() if not k.startswith("model.")})
    with hub_server(repositories) as address:
        there = environment | {"HF_ENDPOINT": address}
        named = ("hf://datasets/them/doubles", "--name", "doubles", "--version", "v1")
        done = ours(there, "datasets", "ingest", *named)
        assert done.returncode == 0, done.stderr
        assert "train 54" in done.stdout or "test 12" in done.stdout
        shown = ours(there, "datasets", "show", "doubles-v1").stdout
        assert "of hf://datasets/them/doubles@" in shown
        trained = ours(there, "train", *words)
        assert trained.returncode == 0, trained.stderr
        absent = ours(there, "models", "inspect", "hf://them/absent")
        assert absent.returncode == 2
        run_id = last_json(trained.stdout)["run_id"]
    config = next((Path(environment["TUNIX_MLFLOW_HOME"]) / "runs").glob(f"*{run_id}*/config.json"))
    base = json.loads(config.read_text())["base"]
    assert base.startswith("hf://them/small@")
    assert len(base.partition("@")[2]) == 40
    resumed = ours(there, "resume", run_id, "training.steps=5")
    assert resumed.returncode == 0, resumed.stderr
    exported = ours(there, "models", "export", run_id, str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    away = ours(there, "models", "inspect", "hf://them/other")
    assert away.returncode == 4
    assert "cannot fetch hf://them/other" in away.stderr
    assert not list(Path(environment["HF_HOME"]).rglob("*.bin"))
    for text in (trained.stdout, trained.stderr, resumed.stderr, away.stderr):
        assert SECRET not in text
    for path in Path(environment["TUNIX_MLFLOW_HOME"]).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", "hf://../x", "hf://a/b@", "hf://a b/c"])
def test_names_that_are_none(name: str, environment: dict[str, str]) -> None:
    """One line, and nothing is asked of anybody."""
    done = ours(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "models", "inspect", name)
    assert done.returncode == 2
    assert "expected hf://[datasets/]OWNER/NAME" in done.stderr
