"""A run's folder that was damaged: repaired from MLflow, or named in one line; never silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BeginFrom, last_json, run_here, tiny, write_traces
from tunix_mlflow import paths
from tunix_mlflow.config.load import load_config
from tunix_mlflow.data import datasets
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.tracking import tags

STEPS = 6


@pytest.fixture
def finished(begin_from: BeginFrom, tmp_path: Path) -> str:
    """A run of a store of its own."""

    def make() -> str:
        datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
        small = {"dataset": "doubles-v1", "evaluation__samples": "0"}
        return train(load_config(None, tiny(training__steps=str(STEPS), **small))).run_id

    return begin_from("to_repair", make)


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def insert(name: str, line: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        lines.insert(len(lines) // 2, line + b"\n")
        (folder / name).write_bytes(b"".join(lines))

    return change


def flip(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert old in data
        (folder / name).write_bytes(data.replace(old, new))

    return change


DAMAGE = {
    "events cut short": cut("events.jsonl"),
    "events deleted": delete("events.jsonl"),
    "events empty": write("events.jsonl", b""),
    "a null line in events": insert("events.jsonl", b"null"),
    "a line of zero bytes in events": insert("events.jsonl", b"\0" * 50),
    "a changed byte in events": flip("events.jsonl", b"doubles-v1", b"doubled-v1"),
    "an event of a newer version": flip("events.jsonl", b'"version":1', b'"version":7'),
    "metrics cut short": cut("metrics.jsonl"),
    "metrics deleted": delete("metrics.jsonl"),
    "metrics empty": write("metrics.jsonl", b""),
    "a null line in metrics": insert("metrics.jsonl", b"null"),
    "a line of zero bytes in metrics": insert("metrics.jsonl", b"\0" * 50),
    "a cursor beyond its file": write("cursor.json", b'{"fields":9999999,"metrics":9999999}'),
    "a damaged cursor": write("cursor.json", b'{"fields": "many"'),
    "a cursor deleted": delete("cursor.json"),
    "a damaged link": write("run.json", b"\xff\xfe"),
    "a link deleted": delete("run.json"),
    "a damaged configuration": cut("config.json"),
    "a configuration deleted": delete("config.json"),
    "a damaged environment": write("environment.json", b"[1, 2"),
    "an environment that is no table": write("environment.json", b"[]"),
    "an empty lease": write("lease", b""),
    "a lease deleted": delete("lease"),
}


def model_ids(client: MlflowClient, run_id: str) -> list[str]:
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    return [one.model_id for one in outputs.model_outputs]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_repaired(finished: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Afterwards the folder is readable, and MLflow has each point once and the same status."""
    client, folder = MlflowClient(), paths.run_dir(finished)
    before = client.get_metric_history(finished, "train/loss")
    models = model_ids(client, finished)
    DAMAGE[damage](folder)
    assert run_here("runs", "repair", finished, "--json") == 0, capsys.readouterr().err
    done = last_json(capsys.readouterr().out)
    assert done["remaining"] == []
    run = client.get_run(finished)
    assert run.info.status == "FINISHED"
    assert tags.INCOMPLETE not in run.data.tags
    after = client.get_metric_history(finished, "train/loss")
    assert sorted((m.step, m.value, m.timestamp) for m in after) == sorted(
        (m.step, m.value, m.timestamp) for m in before
    )
    assert model_ids(client, finished) == models
    assert run_here("runs", "repair", finished, "--json") == 0
    again = last_json(capsys.readouterr().out)
    assert again["repaired"] == []  # and the second time there is nothing to do


@pytest.mark.parametrize(
    "damage", ["a null line in metrics", "a damaged environment", "a damaged configuration"]
)
def test_resume_names_the_repair(
    finished: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what to run; after it, the run goes on."""
    DAMAGE[damage](paths.run_dir(finished))
    more = ("resume", finished, f"training.steps={STEPS + 2}")
    assert run_here(*more) == 2
    err = capsys.readouterr().err
    assert f"tunix-mlflow runs repair {finished}" in err
    assert "Traceback" not in err
    assert run_here("runs", "repair", finished) == 0
    assert run_here(*more) == 0
    steps = [m.step for m in MlflowClient().get_metric_history(finished, "train/loss")]
    assert sorted(steps) == list(range(1, STEPS + 3))


def test_what_mlflow_lacks_is_recorded_again(
    finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The event log is gone, and MLflow lost the files and the model: the folder has them."""
    client, folder = MlflowClient(), paths.run_dir(finished)
    run = client.get_run(finished)
    shutil.rmtree(run.info.artifact_uri.removeprefix("file://"))
    (folder / "events.jsonl").unlink()
    assert run_here("runs", "repair", finished) == 0, capsys.readouterr().err
    found = {one.path for one in client.list_artifacts(finished)}
    assert {"config.json", "environment.json", "metrics.jsonl"} <= found


def test_nothing_to_repair_from(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What neither side has is one line, and exit code 4; a run that is not here is a mistake."""
    client, folder = MlflowClient(), paths.run_dir(finished)
    shutil.rmtree(client.get_run(finished).info.artifact_uri.removeprefix("file://"))
    (folder / "environment.json").unlink()
    assert run_here("runs", "repair", finished) == 4
    assert "environment.json cannot be read, and MLflow has none" in capsys.readouterr().err
    assert run_here("runs", "repair", "0" * 32) == 2
    assert "there is no run" in capsys.readouterr().err


def test_a_staged_copy_that_is_gone(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An artifact whose copy was lost before it was uploaded is counted, not forgotten."""
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking.record.cursor import Cursor, update_cursor
    from tunix_mlflow.tracking.run import open_run
    from tunix_mlflow.tracking.sync import upload

    with open_run(stage="seed", tracking=TrackingConfig(system_metrics=False), report=print) as run:
        run.log_text("here", "here.txt")
        run.log_text("old", "old.txt")
        run.log_text("new", "old.txt")
        run.sync()
    client = MlflowClient()
    update_cursor(run.folder, lambda _: Cursor())
    upload.sync(client, run.folder, print)  # the copies were deleted when they were uploaded
    assert tags.INCOMPLETE not in client.get_run(run.run_id).data.tags
    artifacts = Path(client.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
    (artifacts / "here.txt").unlink()
    update_cursor(run.folder, lambda _: Cursor())
    upload.sync(client, run.folder, print)
    assert client.get_run(run.run_id).data.tags[tags.INCOMPLETE] == "artifacts: 1"
    assert json.loads((run.folder / "cursor.json").read_text())["refused"][0]["what"]
