"""Against a real MLflow server with basic-auth, as a team has one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from mlflow.tracking import MlflowClient

from tests.conftest import BIN, as_arguments, environment, last_json, tiny, write_traces

Command = Callable[..., subprocess.CompletedProcess[str]]
USER, PASSWORD = "admin", "a-long-password-1234"


class Server(NamedTuple):
    uri: str
    process: subprocess.Popen[bytes]
    log: Path

    def credentials(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, timeout=2).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def launch(words: list[str], log: Path, extra: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            words,
            env=environment(extra),
            stdout=out,
            stderr=out,
            cwd=log.parent,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """The server starts workers; they are its process group."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'auth.db'}\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port, log = free_port(), folder / "log"
    process = launch(
        [
            *(str(BIN / "mlflow"), "server", "--app-name", "basic-auth"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        ],
        log,
        {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-this-test-alone",
        },
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_for(f"{uri}/health", process, log)
        yield Server(uri, process, log)
    finally:
        end(process)


def test_own_data_on_a_teams_server(
    server: Server,
    command: Command,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ingest, train, evaluate, promote, predict and serve; only the state root and the server
    are written to. Without credentials: one line and nothing started."""
    data = write_traces(tmp_path / "support.jsonl", 80)
    home_of_user = tmp_path / "user"
    home_of_user.mkdir()
    user = server.credentials() | {"HOME": str(home_of_user)}

    def ours(*words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = command("tunix-mlflow", *words, env=user | more)
        assert done.returncode == code, done.stderr
        return done

    ours("datasets", "ingest", str(data), "--name", "support", "--version", "v1")
    small = tiny(dataset="support-v1")
    done = ours("train", *as_arguments(small), code=2, MLFLOW_TRACKING_PASSWORD="wrong")
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "runs").exists()

    trained = last_json(ours("train", *as_arguments(small)).stdout)
    scored = ("evaluate", trained["run_id"], "--dataset", "support-v1")
    ours(*scored, "evaluation.max_new_tokens=4")
    gate = ("promote", trained["run_id"], "support")
    promoted = last_json(ours(*gate, "promotion.thresholds.exact_match=0").stdout)
    assert promoted["version"] == "1"

    for name, value in user.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(server.uri, server.uri)
    run = client.get_run(trained["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert len(client.get_metric_history(trained["run_id"], "train/loss")) == 4
    assert client.get_model_version_by_alias("support", "champion").version == "1"

    (tmp_path / "prompts.csv").write_text("prompt\nDouble 1000\nDouble 2000\n")
    done = command(
        *("mlflow", "models", "predict", "-m", "models:/support@champion"),
        *("--env-manager", "local", "-i", str(tmp_path / "prompts.csv"), "-t", "csv"),
        env=user,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.strip().splitlines()[-1])["predictions"]
    assert len(answers) == 2
    assert set(answers[0]) == {"text", "answer"}

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
    }
