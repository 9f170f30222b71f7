"""`doctor`: each thing that a run needs is tried, and what fails has a remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import run_here
from tests.servers import RefusingProxy, Server
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.tracking.run import open_run
from tunix_mlflow.tracking.sync import worker

TRIED = [
    *("versions", "state", "undelivered", "device", "memory", "tracking store", "write"),
    *("artifact store", "delete artifacts", "registry", "delete", "clock"),
]


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingProxy]:
    it = RefusingProxy(server.uri, lambda method, path, length: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", it.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield it
    it.close()


def examine(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, tuple[bool, str]]:
    """What was found, by name: whether it is well, and the text with its remedy."""
    assert run_here("doctor", "--json") == code
    found = json.loads(capsys.readouterr().out)
    return {one["name"]: (one["ok"], f"{one['text']} {one['remedy']}") for one in found}


def test_all_is_well(proxy: RefusingProxy, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is tried, and nothing is left in the stores but an experiment without runs."""
    found = examine(capsys, 0)
    assert list(found) == TRIED
    assert all(ok for ok, _ in found.values())
    client = MlflowClient(proxy.uri)
    experiment = client.get_experiment_by_name("tunix-mlflow-doctor")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []
    assert [m.name for m in client.search_registered_models() if "doctor" in m.name] == []


def test_what_is_not_well_is_named(
    proxy: RefusingProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No deletions, small bodies only, and records that wait."""
    mlflow.set_tracking_uri(proxy.uri)
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.2)

    def refuse(method: str, path: str, length: int) -> int | None:
        if method == "DELETE" or length > 500_000:
            return 403 if method == "DELETE" else 413
        return 429 if path.endswith("/a.txt") else None

    proxy.rule = refuse
    quiet = TrackingConfig(system_metrics=False)
    with open_run(stage="seed", tracking=quiet, report=lambda _: None) as run:
        run.log_text("waits", "a.txt")
    found = examine(capsys, 4)
    assert found["undelivered"] == (
        False,
        "1 runs with records that MLflow does not have, 0 with refused ones run tunix-mlflow sync",
    )
    well, text = found["artifact store"]
    assert not well
    assert "413" in text
    assert found["tracking store"][0]
    assert found["write"][0]
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def test_a_dead_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is on this machine is tried all the same."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = examine(capsys, 4)
    assert list(found) == TRIED[:6]
    assert [name for name, (ok, _) in found.items() if not ok] == ["tracking store"]
