"""Which checkpoints may be deleted and which stay: in one run, and over a store of many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import run_here, write_traces
from tests.test_pipelines import log_score, logged_model
from tests.test_resume import config, interrupted
from tunix_mlflow import paths
from tunix_mlflow.data import datasets
from tunix_mlflow.pipelines.promote import promote
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.models import flavor
from tunix_mlflow.training import checkpoint


@pytest.fixture
def doubles(tmp_path: Path, store: str) -> str:
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    return "doubles-v1"


def here(run_id: str) -> list[int]:
    folder = paths.run_dir(run_id) / "checkpoints"
    return [int(path.name) for path in checkpoint.sealed_checkpoints(folder)]


def uploaded(run_id: str) -> list[int]:
    found = MlflowClient().list_artifacts(run_id, "checkpoints")
    return sorted(int(Path(entry.path).name) for entry in found)


def test_a_run_keeps_what_it_is_told(doubles: str) -> None:
    """The last one, the best by its held-out loss, every sixth; here and in MLflow alike."""
    run_id = train(
        config(
            training__steps="12",
            training__eval_every_steps="2",
            checkpoints__keep_last="1",
            checkpoints__keep_best="1",
            checkpoints__mode="max",
            checkpoints__keep_every_steps="6",
        )
    ).run_id
    history = MlflowClient().get_metric_history(run_id, "validation/loss")
    worst = max(history, key=lambda m: (m.value, m.step)).step  # mode=max keeps it
    assert here(run_id) == uploaded(run_id) == sorted({worst, 6, 12})


@pytest.fixture
def many(doubles: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs of every kind: registered, aliased, killed, open, deleted, plain, and a stranger."""
    client = MlflowClient()
    longer = {"training__steps": "8", "checkpoints__keep_last": "9"}
    names = ("champion", "registered", "plain", "deleted", "deleted but registered", "open")
    found = {n: train(config(seed=str(i), **longer)).run_id for i, n in enumerate(names)}
    for name in ("champion", "registered", "deleted but registered"):
        model = logged_model(found[name])
        if name == "champion":
            log_score(model, 0.9)
            promote(found[name], "doubles", config=config())
        else:
            mlflow.register_model(f"models:/{model}", "others")
    found["killed"] = interrupted(monkeypatch, 7, seed="9", **longer)
    client.set_tag(found["open"], tags.LEASE, f"somebody {2**42}")
    client.update_run(found["open"], status="RUNNING")
    for name in ("deleted", "deleted but registered"):
        client.delete_run(found[name])
    stranger = paths.run_dir("f" * 32) / "checkpoints"
    source = paths.run_dir(found["plain"]) / "checkpoints"
    stranger.mkdir(parents=True)
    for folder in checkpoint.sealed_checkpoints(source):
        (stranger / folder.name).symlink_to(folder)
    found["stranger"] = "f" * 32
    return found


def test_prune_takes_nothing_that_is_needed(many: dict[str, str], capsys: Any) -> None:
    """Shown first, with its bytes; then done; and every model still loads."""
    everything = {name: here(run_id) for name, run_id in many.items()}
    assert set(map(tuple, everything.values())) == {(2, 4, 6, 8), (2, 4, 6, 7)}
    capsys.readouterr()
    assert run_here("checkpoints", "prune", "--json") == 0
    survey = json.loads(capsys.readouterr().out)
    assert not survey["done"]
    assert survey["freed_bytes"] > 0
    assert {name: here(run_id) for name, run_id in many.items()} == everything
    assert run_here("checkpoints", "prune", "--yes") == 0
    assert "deleted" in capsys.readouterr().out
    left = {name: here(run_id) for name, run_id in many.items() if name != "stranger"}
    assert left == {
        "champion": [8],
        "registered": [8],
        "plain": [8],
        "deleted": [],
        "deleted but registered": [8],
        "open": [2, 4, 6, 8],
        "killed": [6, 7],
    }
    assert {name: uploaded(many[name]) for name in left} == left
    assert len(list((paths.run_dir("f" * 32) / "checkpoints").iterdir())) == 4
    client = MlflowClient()
    assert flavor.load_model("models:/doubles@champion")
    for version in client.search_model_versions("name = 'others'"):
        assert flavor.load_model(f"models:/others/{version.version}")
    assert run_here("resume", many["killed"]) == 0
    assert run_here("checkpoints", "prune", "--yes", "--run", many["champion"]) == 0
    assert here(many["champion"]) == [8]
    assert run_here("checkpoints", "list") == 0


def test_verify_names_the_damaged(doubles: str, capsys: Any) -> None:
    """Here and in MLflow, file by file; exit code 3."""
    run_id = train(config()).run_id
    assert run_here("checkpoints", "verify") == 0
    place = Path(MlflowClient().get_run(run_id).info.artifact_uri.removeprefix("file://"))
    for root in (paths.run_dir(run_id), place):
        victim = next((root / "checkpoints" / "00000008" / "state").rglob("*/d/*"))
        victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    assert run_here("checkpoints", "verify", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["checked"] == 6
    assert {(d["step"], d["where"]) for d in found["damaged"]} == {(8, "here"), (8, "uploaded")}
