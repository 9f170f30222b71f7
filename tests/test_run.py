"""Runs: what they record, and the status however they end."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.schema import Config, TrackingConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import ConfigError, Interrupted, TrackingError, UnavailableError
from tunix_mlflow.tracking import opening
from tunix_mlflow.tracking import store as links
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.record.cursor import Cursor, update_cursor
from tunix_mlflow.tracking.record.records import Record, Status
from tunix_mlflow.tracking.recorder import encode_table
from tunix_mlflow.tracking.run import Run, open_run, start_run
from tunix_mlflow.tracking.runs import resume
from tunix_mlflow.tracking.sync import calls, lease, upload, worker
from tunix_mlflow.tracking.sync.delivery import Away, Delivery

QUIET = TrackingConfig(system_metrics=False)
DIGEST = "tunix_mlflow.dataset_digest"


def opened(
    tracking: TrackingConfig = QUIET,
    report: Callable[[str], None] = lambda _: None,
    **more: Any,
) -> Run:
    """The run of a pipeline."""
    return open_run(stage="train", tracking=tracking, report=report, **more)


def started(**more: Any) -> Run:
    """A user's run."""
    return start_run(**{"log_system_metrics": False, **more})


def ours(run_id: str) -> set[str]:
    """The tags of ours that a run has."""
    tags = MlflowClient().get_run(run_id).data.tags
    return {name for name in tags if name.startswith("tunix_mlflow.")}


def dead_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_a_finished_run_has_everything(store: str) -> None:
    """Parameters, tags, metrics, inputs with distinct digests, artifacts, note, status."""
    manifest = datasets.seed("golden-v2").manifest
    with opened(tags={"tunix_mlflow.config_digest": "c" * 64}) as run:
        run.log_params({"optimizer.learning_rate": 0.001})
        run.log_metrics({"train/loss": 2.0, "train/tokens": 3, "validation/loss": 1.5}, 1)
        for split in manifest.splits:
            run.log_input(TunixMlflowDataset(manifest, split), "training")
        run.set_note("# Hello")
        run.log_table({"prompt": ["a"], "text": ["b"]}, "t.json")
        run.write_file("config.json", b'{"optimizer":{}}')
        figures = run.log_summary(1)
        assert figures["final_loss"] == 2.0
        assert (figures["best_eval_loss"], figures["best_eval_loss_step"]) == (1.5, 1)
        assert run.last("validation/loss") == {"validation/loss": 1.5}
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"optimizer.learning_rate": "0.001"}
    assert found.data.tags["tunix_mlflow.config_digest"] == "c" * 64
    assert found.data.tags["tunix_mlflow.stage"] == "train"
    assert found.data.tags["mlflow.note.content"] == "# Hello"
    assert found.data.metrics["train/loss"] == 2.0
    assert found.data.metrics["total_steps"] == 1
    assert found.inputs is not None
    inputs = found.inputs.dataset_inputs
    assert {i.dataset.name for i in inputs} == {f"golden-v2/{split}" for split in manifest.splits}
    assert len({i.dataset.digest for i in inputs}) == len(manifest.splits)
    assert json.loads(artifact(run.run_id, "config.json")) == {"optimizer": {}}
    experiment = MlflowClient().get_experiment(run.experiment_id or "")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert list(Path.cwd().iterdir()) == []


def artifact(run_id: str, path: str) -> str:
    """An artifact's text."""
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path)).read_text()


def test_the_dataset_source_gives_the_very_rows_back(store: str) -> None:
    """Through MLflow's own way: run -> input -> source -> load."""
    manifest = datasets.seed("golden-v2").manifest
    with opened() as run:
        run.log_input(TunixMlflowDataset(manifest, "test"), "evaluation")
    inputs = MlflowClient().get_run(run.run_id).inputs
    assert inputs is not None
    (given,) = inputs.dataset_inputs
    source = mlflow.data.get_source(given.dataset)
    rows = source.load()
    assert len(rows) == manifest.splits["test"].count
    assert all(row.meta["golden"] == "v2" for row in rows)
    assert json.loads(given.dataset.profile or "")["dataset_digest"] == manifest.digest


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("no such thing"), "FAILED", "no such thing"),
        (ValueError("bug\nwith lines"), "FAILED", "bug with lines"),
        (SystemExit(3), "FAILED", "exited with code 3"),
        (SystemExit(0), "FINISHED", None),
        (Interrupted(signal.SIGTERM), "KILLED", "interrupted by SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "interrupted by SIGINT"),
    ],
)
@pytest.mark.parametrize("begin", [opened, started])
def test_every_way_out_sets_the_status(
    store: str, error: BaseException, status: str, message: str | None, begin: Callable[[], Run]
) -> None:
    """And the message, and the metrics written before, and nothing stays active."""
    with pytest.raises(type(error)), begin() as run:
        run.log_metrics({"train/loss": 5.0}, 1)
        raise error
    found = MlflowClient().get_run(run.run_id)
    assert (found.info.status, found.data.tags.get("tunix_mlflow.error")) == (status, message)
    assert found.data.metrics["train/loss"] == 5.0
    assert mlflow.active_run() is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_whose_beginning_was_cut_off_is_found(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: bool
) -> None:
    """Made by a process that died before it had a folder: the next command of this machine ends
    it, and one of another machine once the lease is over."""
    short = TrackingConfig(system_metrics=False, lease_seconds=2)

    def die(*_: object, **__: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(lease, "record_owner", die)
        patched.setattr(opening, "_give_up", lambda *_: None)  # a dead process does nothing
        with pytest.raises(SystemExit):
            opened(short)
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (ghost,) = client.search_runs(experiments)
    reports: list[str] = []
    if elsewhere:
        monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "another"))
        with opened(short, reports.append):
            assert client.get_run(ghost.info.run_id).info.status == "RUNNING"
        time.sleep(2)
    with opened(short, reports.append):
        pass
    assert elsewhere or not list(paths.open_runs().iterdir())
    assert client.get_run(ghost.info.run_id).info.status == "KILLED"
    assert any(ghost.info.run_id in report for report in reports)


def test_a_run_of_another_stage_is_not_taken(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_RUN_ID may name any run; the one that it names keeps its stage."""
    with open_run(stage="train", tracking=QUIET, report=print) as trained:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", trained.run_id)
    with pytest.raises(TrackingError, match="of the stage train"):
        open_run(stage="seed", tracking=QUIET, report=print)
    found = MlflowClient().get_run(trained.run_id)
    assert (found.info.status, found.data.tags["tunix_mlflow.stage"]) == ("FINISHED", "train")


def test_children_are_linked(store: str) -> None:
    """A run inside a run is its child, in its experiment, whoever made either; all end."""
    with open_run(stage="main", tracking=QUIET, report=print) as outer, opened() as inner:
        pass
    client = MlflowClient()
    child = client.get_run(inner.run_id)
    assert child.data.tags["mlflow.parentRunId"] == outer.run_id
    assert child.info.status == client.get_run(outer.run_id).info.status == "FINISHED"
    with mlflow.start_run() as theirs, started() as mine, mlflow.start_run(nested=True) as last:
        pass
    found = client.get_run(mine.run_id)
    assert found.data.tags["mlflow.parentRunId"] == theirs.info.run_id
    assert found.info.experiment_id == theirs.info.experiment_id
    assert client.get_run(last.info.run_id).data.tags["mlflow.parentRunId"] == mine.run_id


def test_an_unreachable_server_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, home: Path, store: str
) -> None:
    """Said at once, without the password; the run is recorded, and uploaded later, once. It is
    MLflow's active run meanwhile."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    mlflow.set_tracking_uri(f"http://user:secret@127.0.0.1:{dead_port()}")
    reports: list[str] = []
    with opened(report=reports.append) as run:
        run.log_metrics({"train/loss": 1.0, "train/tokens": 2}, 1)
        run.log_table({"a": ["b"]}, "t.json")
        run.log_text("hello", "a.txt")
        run.log_summary(1)
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.run_id == run.folder.name
        with opened(report=reports.append) as child:
            pass
    assert mlflow.active_run() is None
    reports = [r for r in reports if child.run_id not in r]
    assert "does not answer" in reports[0]
    assert f"tunix-mlflow sync {run.run_id}" in reports[-1]
    assert len(reports) == 2
    assert "secret" not in "".join(reports)
    mlflow.set_tracking_uri(store)
    client = MlflowClient()
    for _ in range(2):
        upload.catch_up(client, run.folder, reports.append)
        update_cursor(run.folder, lambda _: Cursor())  # as if a process had died before this
    upload.catch_up(client, run.folder, reports.append)
    assert len(reports) == 2
    found = client.get_run(run.run_id)
    assert found.data.tags["tunix_mlflow.local_id"] == run.folder.name != run.run_id
    assert paths.run_dir(run.run_id).resolve() == run.folder
    assert found.info.status == "FINISHED"
    assert found.info.end_time < time.time() * 1000
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "train/loss")] == [
        (1, 1.0)
    ]
    assert {f.path for f in client.list_artifacts(run.run_id)} == {
        *("metrics.jsonl", "t.json", "a.txt")
    }
    upload.sync(client, child.folder, reports.append)
    parent = client.get_run(child.run_id).data.tags["mlflow.parentRunId"]
    assert parent == run.run_id
    assert len(client.search_runs([found.info.experiment_id])) == 2


def test_offline_records_in_a_store_of_its_own(store: str) -> None:
    """tracking.offline=true touches no server."""
    offline = TrackingConfig(offline=True, system_metrics=False)
    with opened(offline) as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    found = MlflowClient(paths.offline_tracking_uri()).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/loss"] == 1.0
    assert MlflowClient(store).search_runs(["0"]) == []


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_signal_while_a_run_ends(
    store: str, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """The run gets its status first; then who waits for the signal gets it, unless a signal ended
    the run already."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    deliver = calls.deliver

    def interrupted(
        client: MlflowClient, folder: Path, record: Record, report: Callable[[str], None]
    ) -> None:
        if isinstance(record, Status):
            os.kill(os.getpid(), signal.SIGTERM)
        deliver(client, folder, record, report)

    try:
        run = opened()
        monkeypatch.setattr(calls, "deliver", interrupted)
        assert run.end(status)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert MlflowClient().get_run(run.run_id).info.status == status
    assert heard == ([signal.SIGTERM] if status == "FINISHED" else [])


def test_a_run_ends_in_one_of_three_ways(store: str) -> None:
    """Another status is refused at once; a second end says what the first one said."""
    run = opened()
    with pytest.raises(TrackingError, match="a run ends FINISHED, FAILED, KILLED, not 'SUCCESS'"):
        run.end("SUCCESS")
    assert run.end("FAILED")
    assert run.end()
    assert MlflowClient().get_run(run.run_id).info.status == "FAILED"


def test_one_experiment(store: str) -> None:
    """Its name or its id; both would leave one of them without effect."""
    with pytest.raises(TrackingError, match="experiment or experiment_id, not both"):
        start_run(experiment="a", experiment_id="0")


def test_another_dataset_is_refused_before_the_run_is_touched(store: str) -> None:
    """Continuing a run under another digest names it, and the run stays as it was."""
    with opened(tags={DIGEST: "a" * 64}) as run:
        pass
    with pytest.raises(TrackingError, match="another dataset_digest"):
        opened(run_id=run.run_id, tags={DIGEST: "b" * 64})
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags[DIGEST] == "a" * 64


def test_a_run_is_open_once(store: str) -> None:
    """A second one to continue it is told so, here and elsewhere; worth a retry."""
    with started() as run:
        with pytest.raises(UnavailableError, match="is open in another process"):
            started(run_id=run.run_id)
        with pytest.raises(UnavailableError, match="is open in another process"):
            upload.sync(MlflowClient(), run.folder, print)
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_what_cannot_be_resumed(store: str) -> None:
    """No run, another's run, a finished one: one line each."""
    with pytest.raises(TrackingError, match="there is no run"):
        resume.to_resume("0" * 32, print)
    with mlflow.start_run() as other:
        pass
    with pytest.raises(TrackingError, match="not a training run of ours"):
        resume.to_resume(other.info.run_id, print)
    with opened(tags={DIGEST: "a" * 64}) as run:
        run.write_file("config.json", to_json(Config()))
        run.write_file("environment.json", b"{}")
    with pytest.raises(TrackingError, match="has finished"):
        resume.to_resume(run.run_id, print)


def test_links_open_the_training_view(store: str) -> None:
    """A fresh browser would hide runs and registry otherwise."""
    with opened() as run:
        assert run.link.endswith("?workflowType=machine_learning")
        assert run.run_id in run.link


def test_credentials_stay_out_of_links() -> None:
    """An address with user and password is shown without them."""
    link = links.run_link("1", base="https://me:secret@example.org/mlflow")
    assert link.startswith("https://example.org/mlflow/#/experiments/1")


def test_an_upload_that_fails_is_made_good(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server away at a checkpoint costs neither the run nor the checkpoint; its manifest is
    the last file to arrive."""
    real, calls, order = MlflowClient.log_artifacts, iter([True]), []

    def flaky(self: MlflowClient, *words: Any) -> None:
        if next(calls, False):
            raise ConnectionError("away")
        order.append(words[-1])
        real(self, *words)

    monkeypatch.setattr(MlflowClient, "log_artifacts", flaky)
    with opened() as run:
        place = run.folder / "checkpoints" / "1"
        (place / "state").mkdir(parents=True)
        (place / "state" / "x").write_text("x")
        (place / "manifest.json").write_text("{}")
        run.log_artifacts(place, "checkpoints/1")
    assert order == ["checkpoints/1/state"]
    kept = MlflowClient().list_artifacts(run.run_id, "checkpoints/1")
    assert [f.path for f in kept] == ["checkpoints/1/manifest.json", "checkpoints/1/state"]


def test_points_that_mlflow_refuses_hold_nothing_up(store: str) -> None:
    """A name that it does not allow: said once, and all the rest is there."""
    said: list[str] = []
    with opened(report=said.append) as run:
        for step in range(50):
            run.log_metrics({"train/loss": step / 3, "what#is": 1.0}, step)
    client = MlflowClient()
    found = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in found) == [(s, s / 3) for s in range(50)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    first, at_the_end = said
    assert "refuses points of 'what#is'" in first
    assert "50 points of what#is" in at_the_end
    assert client.get_run(run.run_id).data.tags["tunix_mlflow.incomplete"] == "metrics: 50"


def test_a_deleted_run_keeps_its_record(store: str) -> None:
    """Deleted while it trains, it can be restored: nothing is passed over as refused."""
    said: list[str] = []
    client = MlflowClient()
    with opened(report=said.append) as run:
        run.sync()
        client.delete_run(run.run_id)
        for step in range(5):
            run.log_metrics({"train/loss": step / 3}, step)
        run._worker.wake()
        time.sleep(1)
        client.restore_run(run.run_id)
    found = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in found) == [(s, s / 3) for s in range(5)]
    assert not [message for message in said if "not recorded" in message]


def test_a_state_root_that_cannot_be_used_starts_no_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; MLflow has no run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "file"))
    with pytest.raises(TrackingError, match="cannot use the state root"):
        opened()
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert client.search_runs(experiments) == []
    assert mlflow.active_run() is None


def test_an_error_is_not_hidden_by_a_dead_server(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended the block is raised; that not all has arrived is only reported."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    reports: list[str] = []

    def broken(self: Delivery) -> bool:
        raise Away("away")

    with (
        pytest.raises(Interrupted),
        opened(report=reports.append) as run,
    ):
        run.sync()
        patched = monkeypatch.context()
        patched.__enter__().setattr(Delivery, "deliver_next", broken)
        run.log_metrics({"train/loss": 1.0}, 1)
        raise Interrupted(signal.SIGTERM)
    assert "nothing is lost" in reports[-1]
    patched.__exit__(None, None, None)
    upload.catch_up(MlflowClient(), run.folder, reports.append)
    found = MlflowClient().get_run(run.run_id)
    assert (found.info.status, found.data.metrics["train/loss"]) == ("KILLED", 1.0)


@pytest.mark.parametrize("uri", ["foo://x", "./mlruns", "sqlite:////", "uc:x"])
def test_a_store_that_cannot_be_used_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever MLFLOW_TRACKING_URI says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="cannot use the MLflow store"):
        started()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_loop_of_its_own_may_time_what_it_likes(store: str) -> None:
    """The summary needs no token counts."""
    with opened() as run:
        run.log_metrics({"train/loss": 1.0, "train_perf/step_time_ms": 3.0}, 1)
        assert run.log_summary(1)["avg_throughput"] == 0.0


def test_a_table_is_strict_json() -> None:
    """numpy's numbers and NaN, at any depth; MLflow's UI parses it with JavaScript."""
    columns = {"a": [np.float32("nan"), np.int64(2), {"x": [math.inf, (np.float64(0.5),)]}]}

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    table = json.loads(encode_table(columns, "t.json"), parse_constant=no_constant)
    assert table["data"] == [[None], [2], [{"x": [None, [0.5]]}]]


def test_a_table_is_replaced_not_doubled(store: str) -> None:
    """A resumed run writes it again; columns or a DataFrame, numbers as they are."""
    columns = {"prompt": ["a", "b"], "answer": ["1", None], "score": [np.float64(0.1), math.nan]}
    with opened() as run:
        run.log_table(columns, "t.json")
        run.log_table(pd.DataFrame(columns), "t.json")
        with pytest.raises(TrackingError, match="different lengths"):
            run.log_table({"a": [1], "b": [1, 2]}, "u.json")
    table = MlflowClient().load_table(run.experiment_id or "", "t.json", run_ids=[run.run_id])
    assert list(table["prompt"]) == ["a", "b"]
    assert table["score"][0] == 0.1
    shown = MlflowClient().get_run(run.run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": "t.json", "type": "table"}]
