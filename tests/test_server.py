"""Against a real MLflow server with basic-auth, as a team has one."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.models
import pytest
import requests
from mlflow.tracking import MlflowClient
from werkzeug.security import generate_password_hash

from tests.conftest import BIN, as_arguments, last_json, run_here, tiny, write_traces
from tests.servers import Server, end, free_port, launch, mlflow_server, wait_for

Command = Callable[..., subprocess.CompletedProcess[str]]
USER, PASSWORD = "admin", "a-long-password-1234"


def cheapen_password(database: Path) -> None:
    """Store the password's hash with one round: checking it is most of the work of a request."""
    digest = generate_password_hash(PASSWORD, method="pbkdf2:sha256:1")
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        done = connection.execute("UPDATE users SET password_hash = ?", [digest])
        assert done.rowcount == 1


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'auth.db'}\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    extra = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-this-test-alone",
    }
    with mlflow_server(folder, empty_database, "--app-name", "basic-auth", extra=extra) as it:
        cheapen_password(folder / "auth.db")
        yield it


def test_own_data_on_a_teams_server(
    server: Server,
    command: Command,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ingest, train, evaluate, promote, predict and serve; only the state root and the server
    are written to. Without credentials: one line and nothing started."""
    data = write_traces(tmp_path / "support.jsonl", 80)
    home_of_user = tmp_path / "user"
    home_of_user.mkdir()
    user = {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "HOME": str(home_of_user),
    }
    for name, value in user.items():
        monkeypatch.setenv(name, value)

    def ours(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run_here(*words) == 0, capsys.readouterr().err
        return last_json(capsys.readouterr().out)

    key = ("--name", "support", "--version", "v1")
    assert run_here("datasets", "ingest", str(data), *key) == 0
    small = as_arguments(tiny(dataset="support-v1", training__save_every_steps="4"))
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        assert run_here("train", *small) == 2
    said = capsys.readouterr().err
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
    assert "Traceback" not in said
    assert not (home / "runs").exists()

    done = command("tunix-mlflow", "train", *small)
    assert done.returncode == 0, done.stderr
    run_id = last_json(done.stdout)["run_id"]
    ours("evaluate", run_id, "--dataset", "support-v1", "evaluation.max_new_tokens=4")
    promoted = ours("promote", run_id, "support", "promotion.thresholds.exact_match=0")
    assert promoted["version"] == "1"

    client = MlflowClient(server.uri, server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert str(run.info.artifact_uri).startswith("mlflow-artifacts:")
    assert len(client.get_metric_history(run_id, "train/loss")) == 4
    assert client.get_model_version_by_alias("support", "champion").version == "1"

    (tmp_path / "prompts.csv").write_text("prompt\nDouble 1000\nDouble 2000\n")
    mlflow.models.predict(  # what `mlflow models predict` calls
        "models:/support@champion",
        input_path=str(tmp_path / "prompts.csv"),
        content_type="csv",
        output_path=str(tmp_path / "answers.json"),
        env_manager="local",
    )
    answers = json.loads((tmp_path / "answers.json").read_text())["predictions"]
    assert len(answers) == 2
    assert set(answers[0]) == {"text", "answer", "finish_reason", "error"}

    port, log = free_port(), tmp_path / "serve.log"
    serving = launch(
        [
            *(str(BIN / "mlflow"), "models", "serve", "-m", "models:/support@champion"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ],
        log,
        user,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", serving, log)
        sent = {"dataframe_split": {"columns": ["prompt"], "data": [["Double 1000"]]}}
        reply = requests.post(f"http://127.0.0.1:{port}/invocations", json=sent, timeout=60)
        assert reply.json()["predictions"] == answers[:1]
    finally:
        end(serving)
    assert list(Path.cwd().iterdir()) == []
    assert [p.name for p in home_of_user.rglob("*") if "tunix" in p.name] == []
    assert {p.name for p in home.iterdir()} <= {
        "catalog.duckdb",
        "catalog.duckdb.gate",
        "catalog.duckdb.lock",
        "snapshots",
        "runs",
        "cache",
        "tmp",
        "open",
    }
