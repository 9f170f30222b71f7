"""What dead processes leave: runs get a status, the rest is found, shown, and removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from msgspec.structs import replace

from tests.conftest import environment, run_here
from tests.servers import RefusingProxy, Server
from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.pipelines.clean import clean
from tunix_mlflow.tracking import active, tags
from tunix_mlflow.tracking.record import marker
from tunix_mlflow.tracking.record.cursor import pending_bytes, update_cursor
from tunix_mlflow.tracking.record.folder import LOCK
from tunix_mlflow.tracking.record.marker import About
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.sync import lease

QUIET = TrackingConfig(system_metrics=False)
DYING = """
import os, signal
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.tracking.run import open_run
run = open_run(stage="evaluate", tracking=TrackingConfig(system_metrics=False), report=print)
run.log_metrics({"eval/exact_match": 0.5})
run.sync()
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed() -> str:
    """The id of a run whose process was killed."""
    done = subprocess.run(
        [sys.executable, "-c", DYING],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.split()[-1]


def begun(stage: str = "train") -> Run:
    return open_run(stage=stage, tracking=QUIET, report=lambda _: None)


def status(run_id: str) -> str:
    return str(MlflowClient().get_run(run_id).info.status)


@pytest.mark.parametrize("later", [("runs", "list"), ("checkpoints", "list"), ("sync",)])
def test_any_later_command_ends_a_dead_run(
    store: str, later: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever stage, and at once: its lease would last a minute."""
    dead = killed()
    with begun() as alive:
        assert status(dead) == "KILLED"  # a run that begins is a later command too
        other = killed()
        assert run_here(*later) == 0
        assert status(other) == "KILLED"
        assert status(alive.run_id) == "RUNNING"
    assert f"run {other} was left RUNNING" in capsys.readouterr().err
    assert MlflowClient().get_run(other).data.metrics == {"eval/exact_match": 0.5}
    assert not list(paths.open_runs().iterdir())


def test_clean_shows_then_removes(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of dead processes, a PENDING model, a half checkpoint; what is in use stays."""
    client, dead = MlflowClient(), killed()
    with begun() as ended:
        pass
    experiment = client.get_run(dead).info.experiment_id
    given = {tags.DATASET_DIGEST: "d" * 64}
    for name, value in given.items():
        client.set_tag(ended.run_id, name, value)
    pending = client.create_logged_model(experiment, "half", ended.run_id)
    needed = client.create_logged_model(experiment, "needed", ended.run_id)
    client.create_registered_model("kept")
    client.create_model_version("kept", f"models:/{needed.model_id}", ended.run_id)
    client.log_text(ended.run_id, "x", "checkpoints/00000004/state/part")
    left = [
        paths.temporary_dir() / f".scratch-{files._MACHINE}-999999999-a" / "file",
        paths.run_dir(ended.run_id) / "checkpoints" / ".deleting-00000002" / "file",
        paths.run_dir(ended.run_id) / "checkpoints" / "00000003" / "torn",
        paths.run_dir(ended.run_id) / f".cursor.json.{files._MACHINE}-999999999.part",
        paths.run_dir("f" * 32) / LOCK,
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    own = paths.temporary_dir() / f".scratch-{files._MACHINE}-{os.getpid()}-a"
    own.mkdir()
    with begun() as alive:
        # The run that begins has ended the dead one already.
        client.update_run(dead, status="RUNNING")
        inside = alive.folder / f".cursor.json.{files._MACHINE}-999999999.part"
        inside.touch()
        assert run_here("clean", "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        found = {one["where"] for one in shown["leftovers"]}
        assert found >= {dead, pending.model_id, f"{ended.run_id}/checkpoints/00000004"}
        assert len(found) == 3 + len(left), found
        assert all(path.exists() for path in left)
        assert status(dead) == "RUNNING"
        assert run_here("clean", "--yes") == 0
        assert "removed 8 leftovers" in capsys.readouterr().out
        assert inside.exists()
        assert status(alive.run_id) == "RUNNING"
    assert own.exists()
    assert not any(path.exists() for path in left)
    assert status(dead) == "KILLED"
    models = client.search_logged_models([experiment])
    assert [model.model_id for model in models] == [needed.model_id]
    assert client.list_artifacts(ended.run_id, "checkpoints") == []
    assert clean().leftovers == []


def test_without_a_server_files_are_cleaned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command says that it did not do all."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    left = paths.temporary_dir() / f".scratch-{files._MACHINE}-999999999-a"
    left.mkdir(parents=True)
    assert run_here("clean", "--yes") == 4
    assert "only files of this machine" in capsys.readouterr().err
    assert not left.exists()


def test_a_lost_answer_makes_nothing_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow made the run, and the connection broke: there is one run, and it is used."""
    lost: list[str] = []

    def rule(method: str, path: str, length: int) -> int | str | None:
        if path.endswith("/runs/create") and not lost:
            lost.append(path)
            return "lost"
        return None

    proxy = RefusingProxy(server.uri, rule)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    mlflow.set_tracking_uri(proxy.uri)
    try:
        with begun() as run:
            pass
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    proxy.close()
    assert lost
    client = MlflowClient(server.uri)
    found: Any = client.get_experiment_by_name(tmp_path.name)
    (only,) = client.search_runs([found.experiment_id])
    assert (only.info.run_id, only.info.status) == (run.run_id, "FINISHED")


def test_a_recorded_end_is_the_status(store: str) -> None:
    """The process died when MLflow had all but the status: nothing is pending afterwards."""
    with begun("seed") as run:
        run.log_metrics({"loss": 1.0})
    client = MlflowClient()
    client.update_run(run.run_id, status="RUNNING")
    update_cursor(run.folder, lambda cursor: replace(cursor, status=0))
    client.set_tag(run.run_id, tags.LEASE, f"{lease.owner_of(run.folder)} 0")
    marker.place(lease.owner_of(run.folder), About(store, folder=run.folder.name)).release(
        remove=False
    )
    assert run_here("runs", "list") == 0
    assert status(run.run_id) == "FINISHED"
    assert pending_bytes(run.folder) == 0


def test_requests_are_repeated_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two threads overlap, and the user changes his mind meanwhile."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.delenv(name, raising=False)
    active.set_request_limits()
    first, second = active.no_retries(), active.no_retries()
    first.__enter__()
    second.__enter__()
    assert os.environ[name] == "0"
    first.__exit__(None, None, None)
    assert os.environ[name] == "0"
    second.__exit__(None, None, None)
    assert os.environ[name] == "1"
    with active.no_retries():
        active.restore_request_limits()
        assert os.environ[name] == "0"
    assert name not in os.environ
    active.set_request_limits()
    os.environ[name] = "3"
    with active.no_retries():
        assert os.environ[name] == "0"
    assert os.environ[name] == "3"
    active.restore_request_limits()
    assert os.environ[name] == "3"
