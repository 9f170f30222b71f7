"""The run session: what it records, and the status however the block ends."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths, session
from tunix_mlflow.config.identity import config_digest
from tunix_mlflow.config.schema import Config, TrackingConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import ConfigError, Interrupted, TrackingError
from tunix_mlflow.tracking import run as sessions
from tunix_mlflow.tracking import store as links
from tunix_mlflow.tracking.record import event_log
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.sync import delivery, lease, worker

QUIET = Config(tracking=TrackingConfig(system_metrics=False))


def test_a_finished_run_has_everything(store: str) -> None:
    """Parameters, tags, metrics, inputs with distinct digests, artifacts, note, status."""
    manifest = datasets.seed("golden-v2").manifest
    with session(QUIET, stage="train") as run:
        run.write_scalars(1, {"train/loss": 2.0, "train/tokens": 3})
        for split in manifest.splits:
            run.log_dataset(manifest, split, usage="training")
        run.log_note("# Hello")
        run.log_table({"prompt": ["a"], "text": ["b"]}, "t.json")
        assert run.log_summary(1)["final_loss"] == 2.0
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.learning_rate"] == "0.001"
    assert found.data.tags["tunix_mlflow.config_digest"] == config_digest(QUIET)
    assert found.data.tags["mlflow.note.content"] == "# Hello"
    assert found.data.metrics["train/loss"] == 2.0
    assert found.data.metrics["total_steps"] == 1
    inputs = found.inputs.dataset_inputs
    assert {i.dataset.name for i in inputs} == {"golden-v2/train", "golden-v2/test"}
    assert len({i.dataset.digest for i in inputs}) == 2
    stored = json.loads(
        Path(
            mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="config.json")
        ).read_text()
    )
    assert stored["optimizer"]["learning_rate"] == 0.001
    experiment = MlflowClient().get_experiment(run.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert list(Path.cwd().iterdir()) == []


def test_the_dataset_source_gives_the_very_rows_back(store: str) -> None:
    """Through MLflow's own way: run -> input -> source -> load."""
    manifest = datasets.seed("golden-v2").manifest
    with session(QUIET, stage="train") as run:
        run.log_dataset(manifest, "test", usage="evaluation")
    (given,) = MlflowClient().get_run(run.run_id).inputs.dataset_inputs
    source = mlflow.data.get_source(given.dataset)
    rows = source.load()
    assert len(rows) == manifest.splits["test"].count
    assert all(row.meta["golden"] == "v2" for row in rows)
    assert json.loads(given.dataset.profile)["dataset_digest"] == manifest.digest


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("no such thing"), "FAILED", "no such thing"),
        (ValueError("bug\nwith lines"), "FAILED", "bug with lines"),
        (SystemExit(3), "FAILED", "3"),
        (Interrupted(signal.SIGTERM), "KILLED", "interrupted by SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "interrupted by SIGINT"),
    ],
)
def test_every_way_out_sets_the_status(
    store: str, error: BaseException, status: str, message: str
) -> None:
    """And the message, and the metrics written before, and nothing stays active."""
    with pytest.raises(type(error)), session(QUIET, stage="train") as run:
        run.write_scalars(1, {"train/loss": 5.0})
        raise error
    found = MlflowClient().get_run(run.run_id)
    assert (found.info.status, found.data.tags["tunix_mlflow.error"]) == (status, message)
    assert found.data.metrics["train/loss"] == 5.0
    assert mlflow.active_run() is None


def test_a_run_whose_beginning_was_cut_off_is_found(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by a process that died before it held the lease: ended once that time is over."""
    short = Config(tracking=TrackingConfig(system_metrics=False, lease_seconds=2))

    def die(*_: object, **__: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(lease, "acquire", die)
        patched.setattr(sessions, "_leave_fluent", lambda *_: None)
        with pytest.raises(SystemExit), session(short, stage="train"):
            pass
    ghost = mlflow.active_run()
    assert ghost is not None
    mlflow.tracking.fluent._active_run_stack.set([])
    reports: list[str] = []
    with session(short, stage="train", report=reports.append):
        assert MlflowClient().get_run(ghost.info.run_id).info.status == "RUNNING"
    time.sleep(2)
    with session(short, stage="train", report=reports.append):
        pass
    assert MlflowClient().get_run(ghost.info.run_id).info.status == "KILLED"
    assert any(ghost.info.run_id in report for report in reports)


def test_children_are_linked(store: str) -> None:
    """A session inside a session is its child; both end."""
    with session(QUIET, stage="main") as outer, session(QUIET, stage="train") as inner:
        pass
    child = MlflowClient().get_run(inner.run_id)
    assert child.data.tags["mlflow.parentRunId"] == outer.run_id
    assert child.info.status == MlflowClient().get_run(outer.run_id).info.status == "FINISHED"


def test_the_context_plugin_is_silent_outside(store: str) -> None:
    """Other people's runs get none of our tags; runs inside a session do."""
    with mlflow.start_run() as before:
        pass
    with session(QUIET, stage="train"), mlflow.start_run(nested=True) as inside:
        pass
    with mlflow.start_run() as after:
        pass
    client = MlflowClient()

    def ours(run_id: str) -> set[str]:
        return {k for k in client.get_run(run_id).data.tags if k.startswith("tunix_mlflow.")}

    assert ours(before.info.run_id) == ours(after.info.run_id) == set()
    assert "tunix_mlflow.stage" in ours(inside.info.run_id)


def test_launched_by_mlflow_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that `mlflow run` made is taken over; parameters that it logged stay as they are."""
    client = MlflowClient()
    made = client.create_run("0").info.run_id
    client.log_param(made, "dataset", "'as the shell quoted it'")
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with session(QUIET, stage="train") as run:
        assert run.run_id == made
    found = client.get_run(made)
    assert found.data.params["dataset"] == "'as the shell quoted it'"
    assert found.data.tags["tunix_mlflow.stage"] == "train"


def test_an_unreachable_server_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, home: Path, store: str
) -> None:
    """Said at once, without the password; the run is recorded, and MLflow told later, once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    mlflow.set_tracking_uri(f"http://user:secret@127.0.0.1:{port}")
    reports: list[str] = []
    with session(QUIET, stage="train", report=reports.append) as run:
        run.write_scalars(1, {"train/loss": 1.0, "train/tokens": 2})
        run.log_table({"a": ["b"]}, "t.json")
        run.log_summary(1)
    assert "does not answer" in reports[0]
    assert f"tunix-mlflow sync {run.run_id}" in reports[-1]
    assert len(reports) == 2
    assert "secret" not in "".join(reports)
    mlflow.set_tracking_uri(store)
    client = MlflowClient()
    for _ in range(2):
        lookup.catch_up(client, run.folder, reports.append)
        event_log.move_cursor(
            run.folder, event_log.Cursor()
        )  # as if a process had died before this
    lookup.catch_up(client, run.folder, reports.append)
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
        *("config.json", "environment.json", "metrics.jsonl", "t.json")
    }
    assert len(client.search_runs([found.info.experiment_id])) == 1


def test_offline_records_in_a_store_of_its_own(store: str) -> None:
    """tracking.offline=true touches no server."""
    offline = Config(tracking=TrackingConfig(offline=True, system_metrics=False))
    with session(offline, stage="train") as run:
        run.write_scalars(1, {"train/loss": 1.0})
    found = MlflowClient(paths.offline_tracking_uri()).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/loss"] == 1.0
    assert MlflowClient(store).search_runs(["0"]) == []


def test_another_dataset_is_refused_before_the_run_is_touched(store: str) -> None:
    """Going on with a run under another digest names it, and the run stays as it was."""
    with session(QUIET, stage="train", tags={"tunix_mlflow.dataset_digest": "a" * 64}) as run:
        pass
    with (
        pytest.raises(TrackingError, match="another dataset_digest"),
        session(
            QUIET, stage="train", run_id=run.run_id, tags={"tunix_mlflow.dataset_digest": "b" * 64}
        ),
    ):
        raise AssertionError
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["tunix_mlflow.dataset_digest"] == "a" * 64


def test_what_cannot_be_resumed(store: str) -> None:
    """No run, another's run, a finished one: one line each."""
    with pytest.raises(TrackingError, match="there is no run"):
        lookup.to_resume("0" * 32)
    with mlflow.start_run() as other:
        pass
    with pytest.raises(TrackingError, match="not a training run of ours"):
        lookup.to_resume(other.info.run_id)
    with session(QUIET, stage="train", tags={"tunix_mlflow.dataset_digest": "a" * 64}) as run:
        pass
    with pytest.raises(TrackingError, match="has finished"):
        lookup.to_resume(run.run_id)


def test_links_open_the_training_view(store: str) -> None:
    """A fresh browser would hide runs and registry otherwise."""
    with session(QUIET, stage="train") as run:
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

    def flaky(self: MlflowClient, *words: object) -> None:
        if next(calls, False):
            raise ConnectionError("away")
        order.append(words[-1])
        real(self, *words)

    monkeypatch.setattr(MlflowClient, "log_artifacts", flaky)
    with session(QUIET, stage="train") as run:
        place = run.folder / "checkpoints" / "1"
        (place / "state").mkdir(parents=True)
        (place / "state" / "x").write_text("x")
        (place / "manifest.json").write_text("{}")
        run.log_folder(place, "checkpoints/1")
    assert order == ["checkpoints/1/state"]
    kept = MlflowClient().list_artifacts(run.run_id, "checkpoints/1")
    assert [f.path for f in kept] == ["checkpoints/1/manifest.json", "checkpoints/1/state"]


def test_points_that_mlflow_refuses_hold_nothing_up(store: str) -> None:
    """A name that it does not allow: said once, and all the rest is there."""
    said: list[str] = []
    with session(QUIET, stage="train", report=said.append) as run:
        for step in range(50):
            run.write_scalars(step, {"train/loss": step / 3, "what#is": 1.0})
    client = MlflowClient()
    found = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in found) == [(s, s / 3) for s in range(50)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    (message,) = said
    assert "'what#is' are not recorded" in message


def test_a_deleted_run_keeps_its_record(store: str) -> None:
    """Deleted while it trains, it can be restored: nothing is passed over as refused."""
    said: list[str] = []
    client = MlflowClient()
    with session(QUIET, stage="train", report=said.append) as run:
        run.sync()
        client.delete_run(run.run_id)
        for step in range(5):
            run.write_scalars(step, {"train/loss": step / 3})
        run.shipper.wake()
        time.sleep(1)
        client.restore_run(run.run_id)
    found = client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in found) == [(s, s / 3) for s in range(5)]
    assert not [message for message in said if "not recorded" in message]


def test_a_state_root_that_cannot_be_used_starts_no_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; MLflow hears of nothing."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "file"))
    with (
        pytest.raises(TrackingError, match="cannot use the state root"),
        session(QUIET, stage="train"),
    ):
        raise AssertionError
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert client.search_runs(experiments) == []


def test_an_error_is_not_hidden_by_a_dead_server(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended the block is raised; that not all has arrived is only reported."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    reports: list[str] = []
    real = delivery.step

    def broken(*words: Any) -> bool:
        raise ConnectionError("away")

    with (
        pytest.raises(Interrupted),
        session(QUIET, stage="train", report=reports.append) as run,
    ):
        run.sync()
        monkeypatch.setattr(delivery, "step", broken)
        run.write_scalars(1, {"train/loss": 1.0})
        raise Interrupted(signal.SIGTERM)
    assert "nothing is lost" in reports[-1]
    monkeypatch.setattr(delivery, "step", real)
    lookup.catch_up(MlflowClient(), run.folder, reports.append)
    found = MlflowClient().get_run(run.run_id)
    assert (found.info.status, found.data.metrics["train/loss"]) == ("KILLED", 1.0)


@pytest.mark.parametrize("uri", ["foo://x", "./mlruns", "sqlite:////", "uc:x"])
def test_a_store_that_cannot_be_used_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever MLFLOW_TRACKING_URI says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with (
        pytest.raises(TrackingError, match="cannot use the MLflow store"),
        session(QUIET, stage="train"),
    ):
        raise AssertionError


def test_a_loop_of_its_own_may_time_what_it_likes(store: str) -> None:
    """The summary needs no token counts."""
    with session(QUIET, stage="train") as run:
        run.write_scalars(1, {"train/loss": 1.0, "perf/step_time_ms": 3.0})
        assert run.log_summary(1)["avg_throughput"] == 0.0


def test_a_table_is_replaced_not_doubled(store: str) -> None:
    """A resumed run writes it again."""
    with session(QUIET, stage="train") as run:
        for _ in range(2):
            run.log_table({"prompt": ["a", "b"], "answer": ["1", None]}, "t.json")
    table = MlflowClient().load_table(run.experiment_id, "t.json", run_ids=[run.run_id])
    assert list(table["prompt"]) == ["a", "b"]
    shown = MlflowClient().get_run(run.run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": "t.json", "type": "table"}]
