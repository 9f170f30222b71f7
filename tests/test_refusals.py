"""A server that refuses a part of a run: the rest arrives, and what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import as_arguments, run_here, tiny
from tests.servers import RefusingProxy, Rule, Server
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.record import cursor, records
from tunix_mlflow.tracking.record.folder import CURSOR, EVENT_LOG, METRICS_LOG
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.sync import delivery, upload, worker
from tunix_mlflow.tracking.sync.delivery import LANES, Delivery

QUIET = TrackingConfig(system_metrics=False)
POINTS = 40


def nothing(method: str, path: str, length: int) -> int | None:
    return None


def large_bodies(method: str, path: str, length: int) -> int | None:
    return 413 if length > 20_000 else None


def deletions(method: str, path: str, length: int) -> int | None:
    return 403 if method == "DELETE" else None


def quota(method: str, path: str, length: int) -> int | None:
    return 507 if method == "PUT" else None


def everything(method: str, path: str, length: int) -> int | None:
    return 403 if method != "GET" or "/api/" in path else None


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingProxy]:
    it = RefusingProxy(server.uri, nothing)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", it.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # as the command line does
    monkeypatch.setattr(delivery, "_RETRY_SECONDS", 0.05)
    mlflow.set_tracking_uri(it.uri)
    yield it
    it.close()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def record(run: Run, tmp_path: Path) -> None:
    """Metrics, tags, and artifacts: small and large, one that is replaced, one that is deleted."""
    (tmp_path / "large").write_bytes(b"x" * 50_000)
    run.set_tags({"before": "the files"})
    run.log_text("small", "small.txt")
    run.log_artifact(tmp_path / "large")
    run.log_text("gone", "old/a.txt")
    assert run.sync() in (True, False)
    run.delete_artifact("old")
    for step in range(POINTS):
        run.log_metrics({"train/loss": step / 3}, step)
    run.set_tags({"after": "the files"})


def artifacts(run_id: str) -> set[str]:
    client = MlflowClient()
    top = client.list_artifacts(run_id)
    return {one.path for one in top if not one.is_dir} | {
        inner.path for one in top if one.is_dir for inner in client.list_artifacts(run_id, one.path)
    }


@pytest.mark.parametrize(
    ("rule", "missing", "named"),
    [
        (large_bodies, "artifacts: 1", "artifact large (413"),
        (deletions, "artifacts: 1", "deletion of artifact old (403"),
        (quota, "artifacts: 4", "507"),
    ],
)
def test_what_is_refused_holds_nothing_up(
    proxy: RefusingProxy, tmp_path: Path, rule: Rule, missing: str, named: str
) -> None:
    """Every point and tag, FINISHED, a tag that counts what is missing; when the cause is gone,
    `sync` completes the run."""
    said: list[str] = []
    proxy.rule = rule
    with open_run(stage="train", tracking=QUIET, report=said.append) as run:
        record(run, tmp_path)
    client = MlflowClient()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(s, s / 3) for s in range(POINTS)]
    assert {"before", "after"} <= found.data.tags.keys()
    assert found.data.tags[tags.INCOMPLETE] == missing
    assert named in said[-1]
    assert f"tunix-mlflow sync {run.run_id}" in said[-1]
    upload.sync(client, run.folder, said.append)  # it is refused again, and still counted
    assert tags.INCOMPLETE in client.get_run(run.run_id).data.tags

    proxy.rule = nothing
    upload.sync(client, run.folder, said.append)
    found = client.get_run(run.run_id)
    assert tags.INCOMPLETE not in found.data.tags
    assert found.info.status == "FINISHED"
    assert artifacts(run.run_id) == {"small.txt", "large", "metrics.jsonl"}
    assert not list((run.folder / "staged").glob("*/*"))


def test_a_failure_that_passes(proxy: RefusingProxy, tmp_path: Path) -> None:
    """One file makes the server fail, again and again: the rest goes on, and the file is offered
    once more before the run ends."""
    said: list[str] = []

    def hear(message: str) -> None:
        said.append(message)
        if "refuses artifact large" in message:
            proxy.rule = nothing

    proxy.rule = lambda method, path, length: 500 if path.endswith("/large") else None
    with open_run(stage="train", tracking=QUIET, report=hear) as run:
        record(run, tmp_path)
    assert len(said) == 1
    assert "500" in said[0]
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert tags.INCOMPLETE not in found.data.tags
    assert artifacts(run.run_id) == {"small.txt", "large", "metrics.jsonl"}


def test_a_user_who_may_not_write(
    proxy: RefusingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """403 for all: said as such, nothing is passed over, the run stays RUNNING until it may."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    said: list[str] = []
    with open_run(stage="train", tracking=QUIET, report=said.append) as run:
        assert run.sync()
        proxy.rule = everything
        record(run, tmp_path)
    assert "MLflow refuses this user" in said[-1]
    assert "does not answer" not in said[-1]
    assert cursor.read_cursor(run.folder).refused == ()
    proxy.rule = nothing
    client = MlflowClient()
    assert client.get_run(run.run_id).info.status == "RUNNING"
    upload.sync(client, run.folder, said.append)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert len(client.get_metric_history(run.run_id, "train/loss")) == POINTS
    assert artifacts(run.run_id) == {"small.txt", "large", "metrics.jsonl"}


def test_an_artifact_store_without_its_library(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """s3 without boto3: training is complete but for its files, and exits with 4, or 0 if that is
    allowed; evaluating it says why there is no model."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    client = MlflowClient()
    for name, allowed, code in (("bucket", (), 4), ("allowed", ("tracking.incomplete=allow",), 0)):
        experiment = client.create_experiment(name, artifact_location="s3://no-such-bucket/x")
        words = as_arguments(tiny(tracking__experiment=name))
        assert run_here("train", "golden-v2", *words, *allowed) == code
        out, err = capsys.readouterr()
        assert json.loads(out)["model_id"] is None
        assert "boto3 is not installed" in err
        (run,) = client.search_runs([experiment])
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
        assert "models: 1" in run.data.tags[tags.INCOMPLETE]
    assert run_here("evaluate", run.info.run_id, "--dataset", "golden-v2") == 4
    assert "boto3 is not installed" in capsys.readouterr().err
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda line: line.replace(b"lost", b"l0st"), "checksum"),
        (lambda line: line.replace(b'"version":1', b'"version":9'), "newer tunix-mlflow"),
        (lambda line: b"\0" * (len(line) - 1) + b"\n", "damaged"),
        (lambda _: b"null\n", "damaged"),
        (lambda _: records.encode(records.Tags(tags={}))[:-3] + b"\n", "damaged"),
    ],
)
def test_a_record_that_cannot_be_read(
    store: str, damage: Callable[[bytes], bytes], why: str
) -> None:
    """It is named and passed over; what comes after it arrives, and the status."""
    said: list[str] = []
    with open_run(stage="train", tracking=QUIET, report=said.append) as run:
        run.set_tags({"early": "1"})
        run.set_tags({"lost": "2"})
        run.set_tags({"late": "3"})
        run.log_text("hello", "a.txt")
    log = run.folder / EVENT_LOG
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(damage(line) if b'"lost"' in line else line for line in lines))
    (run.folder / CURSOR).unlink()
    client = MlflowClient()
    for name in ("late", "lost"):
        client.delete_tag(run.run_id, name)
    upload.sync(client, run.folder, said.append)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert "late" in found.data.tags
    assert "lost" not in found.data.tags
    assert found.data.tags[tags.INCOMPLETE] == "fields: 1"
    (message,) = said
    assert why in message


def test_a_damaged_line_of_metrics(store: str) -> None:
    """The points around it arrive; it is counted."""
    said: list[str] = []
    with open_run(stage="train", tracking=QUIET, report=said.append) as run:
        for step in range(3):
            run.log_metrics({"train/loss": step / 3}, step)
    log = run.folder / METRICS_LOG
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"\xff\xfe{\n", b"null\n", b'{"a": 1}\n', *lines[2:]]))
    cursor.update_cursor(run.folder, cursor.rewind_metrics)
    client = MlflowClient()
    upload.sync(client, run.folder, said.append)
    assert client.get_run(run.run_id).data.tags[tags.INCOMPLETE] == "metrics: 3"
    assert len(client.get_metric_history(run.run_id, "train/loss")) == 3


def test_lanes_do_not_wait_for_each_other(
    proxy: RefusingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact store that is down holds up no metric; the status waits, and is true at last."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    said: list[str] = []

    def down(method: str, path: str, length: int) -> int | None:
        return 429 if "mlflow-artifacts" in path else None

    proxy.rule = down
    with open_run(stage="train", tracking=QUIET, report=said.append) as run:
        record(run, tmp_path)
    client = MlflowClient()
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert len(client.get_metric_history(run.run_id, "train/loss")) == POINTS
    assert "artifact store does not answer" in said[-1]
    with pytest.raises(UnavailableError, match="429"):
        upload.sync(client, run.folder, said.append)
    # As `mlflow run` does when the command exits with 0.
    client.set_terminated(run.run_id, "FINISHED")
    with pytest.raises(UnavailableError, match="429"):
        upload.sync(client, run.folder, said.append)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    proxy.rule = nothing
    upload.sync(client, run.folder, said.append)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert artifacts(run.run_id) == {"small.txt", "large", "metrics.jsonl"}


def test_skipped_is_not_offered_again(proxy: RefusingProxy, tmp_path: Path) -> None:
    """`sync --skip` sets aside what is refused; it stays counted, and may be offered later."""
    proxy.rule = large_bodies
    with open_run(stage="train", tracking=QUIET, report=lambda _: None) as run:
        record(run, tmp_path)
    client = MlflowClient()
    proxy.rule = nothing
    assert upload.skip(run.folder) == 1
    upload.sync(client, run.folder, print)
    assert client.get_run(run.run_id).data.tags[tags.INCOMPLETE] == "artifacts: 1"
    assert "large" not in artifacts(run.run_id)
    upload.sync(client, run.folder, print, skipped_too=True)
    assert "large" in artifacts(run.run_id)
    assert tags.INCOMPLETE not in client.get_run(run.run_id).data.tags


def test_delivering_twice_changes_nothing(store: str, tmp_path: Path) -> None:
    """As processes that die after each call, before they move the cursor."""
    with open_run(stage="train", tracking=QUIET, report=print) as run:
        record(run, tmp_path)
    client = MlflowClient()
    before = client.get_run(run.run_id).to_dictionary()
    (run.folder / CURSOR).write_text('{"fields": 99999999}')  # more than there is
    for lane in [Delivery(client, run.folder, name, print) for name in LANES]:
        while lane.deliver_next():
            pass
    after = client.get_run(run.run_id).to_dictionary()
    assert after["data"]["metrics"] == before["data"]["metrics"]
    assert after["info"]["status"] == "FINISHED"
    assert artifacts(run.run_id) == {"small.txt", "large", "metrics.jsonl"}


def test_commands_deliver_what_waits_here(
    proxy: RefusingProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model, then an evaluation, that MLflow does not have yet: said as such while it is away,
    and delivered first when it is back."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    words = as_arguments(tiny(tracking__experiment="waits"))

    def no_models(method: str, path: str, length: int) -> int | None:
        return 429 if method != "GET" and "logged-models" in path else None

    def no_metrics(method: str, path: str, length: int) -> int | None:
        return 429 if path.endswith("log-batch") else None

    proxy.rule = no_models
    assert run_here("train", "golden-v2", *words) == 0  # nothing is refused, and nothing lost
    out, err = capsys.readouterr()
    run_id = json.loads(out)["run_id"]
    assert f"tunix-mlflow sync {run_id}" in err
    few = ("--dataset", "golden-v2", "tracking.experiment=waits")
    assert run_here("evaluate", run_id, *few) == 4
    assert "logged its model, and MLflow does not have it yet" in capsys.readouterr().err
    assert run_here("runs", "list") == 0
    assert "not delivered yet" in capsys.readouterr().out

    proxy.rule = nothing
    assert run_here("sync") == 0
    proxy.rule = no_metrics
    assert run_here("evaluate", run_id, *few) == 0
    capsys.readouterr()
    gate = (run_id, "waits", "promotion.thresholds={exact_match: 0}", "tracking.experiment=waits")
    assert run_here("promote", *gate) == 4
    assert "evaluated model" in capsys.readouterr().err
    proxy.rule = nothing
    assert run_here("promote", *gate) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "promoted, the first"


def test_folders_are_merged_after_a_failure(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first upload of two into one artifact folder fails once: both are there at last."""
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.05)
    real, failed = MlflowClient.log_artifacts, list[tuple[Any, ...]]()

    def once(self: MlflowClient, *words: Any) -> None:
        if not failed:
            failed.append(words)
            raise ConnectionError("away")
        real(self, *words)

    monkeypatch.setattr(MlflowClient, "log_artifacts", once)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    with open_run(stage="seed", tracking=QUIET, report=print) as run:
        for name in ("a", "b"):
            run.log_artifacts(tmp_path / name, "out/")
            run.log_artifacts(tmp_path / name)
    there = {"out/a.txt", "out/b.txt", "a.txt", "b.txt", "metrics.jsonl"}
    assert failed
    assert artifacts(run.run_id) == there
    cursor.update_cursor(run.folder, lambda _: cursor.Cursor())  # all is delivered again
    upload.sync(MlflowClient(), run.folder, print)
    found = MlflowClient().get_run(run.run_id)
    assert tags.INCOMPLETE not in found.data.tags
    assert artifacts(run.run_id) == there


def test_what_is_offered_again_undoes_nothing(store: str) -> None:
    """A refused record holds older values of tags than the run has."""
    with open_run(stage="seed", tracking=QUIET, report=print) as run:
        run.set_tags({"stage": "1", "bad*key": "x"})
        run.set_tags({"stage": "2"})
    client = MlflowClient()
    assert client.get_run(run.run_id).data.tags["stage"] == "2"
    upload.sync(client, run.folder, print)
    found = client.get_run(run.run_id).data.tags
    assert found["stage"] == "2"
    assert found[tags.INCOMPLETE] == "fields: 1"


def test_long_values_are_cut_and_named(store: str) -> None:
    """As long as MLflow takes them."""
    said: list[str] = []
    with open_run(stage="seed", tracking=QUIET, report=said.append) as run:
        run.set_tags({"long": "x" * 9_000, "fits": "x" * 7_000})
    found = MlflowClient().get_run(run.run_id).data.tags
    assert (len(found["long"]), len(found["fits"])) == (8_000, 7_000)
    assert said == ["'long' has 9,000 characters; MLflow takes 8,000 of them"]
