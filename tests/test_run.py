"""Runs: what they record, and the status however they end."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, environment
from tunix_mlflow import paths
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.schema import Config, TrackingConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import ConfigError, Interrupted, TrackingError, UnavailableError
from tunix_mlflow.tracking import opening
from tunix_mlflow.tracking import store as links
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.record import event_log
from tunix_mlflow.tracking.run import Run, open_run, start_run
from tunix_mlflow.tracking.runs import resume
from tunix_mlflow.tracking.sync import delivery, lease, upload, worker

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
        run.log_metrics({"train/loss": 2.0, "train/tokens": 3, "eval/loss": 1.5}, 1)
        for split in manifest.splits:
            run.log_input(TunixMlflowDataset(manifest, split), "training")
        run.set_note("# Hello")
        run.log_table({"prompt": ["a"], "text": ["b"]}, "t.json")
        run.write_file("config.json", b'{"optimizer":{}}')
        figures = run.log_summary(1)
        assert figures["final_loss"] == 2.0
        assert (figures["best_eval_loss"], figures["best_eval_loss_step"]) == (1.5, 1)
        assert run.last("eval/loss") == {"eval/loss": 1.5}
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
        (SystemExit(3), "FAILED", "3"),
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


def test_a_run_whose_beginning_was_cut_off_is_found(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by a process that died before it held the lease: ended once that time is over."""
    short = TrackingConfig(system_metrics=False, lease_seconds=2)

    def die(*_: object, **__: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(lease, "acquire", die)
        patched.setattr(opening, "_give_up", lambda *_: None)  # a dead process does nothing
        with pytest.raises(SystemExit):
            opened(short)
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (ghost,) = client.search_runs(experiments)
    reports: list[str] = []
    with opened(short, reports.append):
        assert client.get_run(ghost.info.run_id).info.status == "RUNNING"
    time.sleep(2)
    with opened(short, reports.append):
        pass
    assert client.get_run(ghost.info.run_id).info.status == "KILLED"
    assert any(ghost.info.run_id in report for report in reports)


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


def test_nested_false_is_an_error_inside_a_run(store: str) -> None:
    """As in MLflow; and the run that is active stays so."""
    with started() as run:
        with pytest.raises(TrackingError, match="is active already"):
            started(nested=False)
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.run_id
    with started(nested=False, parent_run_id=run.run_id) as other:
        pass
    assert MlflowClient().get_run(other.run_id).data.tags["mlflow.parentRunId"] == run.run_id


def test_plain_runs_beside_ours_carry_nothing_of_ours(store: str) -> None:
    """Before, after, in another thread; one that is nested inside has the version at most."""
    elsewhere: list[str] = []

    def plain() -> str:
        with mlflow.start_run(nested=True) as run:
            mlflow.log_metric("score", 1.0)
        return str(run.info.run_id)

    before = plain()
    with started():
        thread = threading.Thread(target=lambda: elsewhere.append(plain()))
        thread.start()
        thread.join()
        inside = plain()
    after = plain()
    assert ours(before) == ours(after) == ours(elsewhere[0]) == set()
    assert ours(inside) <= {"tunix_mlflow.version"}


def test_exactly_what_is_logged_is_recorded(store: str, tmp_path: Path) -> None:
    """No parameter, metric or artifact of ours on a user's run; values as they said them."""
    outside = tmp_path / "data.txt"
    outside.write_text("kept")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inner.txt").write_text("kept too")
    with started(experiment="mine", run_name="first", description="why", tags={"n": 3}) as run:
        run.log_param("rate", 0.10)
        run.log_params({"shape": (1, 2), "name": None})
        for step in range(3):
            run.log_metric("loss", 1 / (step + 1), step=step)
        run.log_metric("final", 0.25)
        run.log_metric("final", 0.75)  # one more point, as in MLflow
        run.log_artifact(str(outside))
        run.log_artifact(folder, "deep")
        run.log_artifacts(str(folder))
        outside.unlink()
        shutil.rmtree(folder)
        run.log_text("hello", "a/b.txt")
        run.log_dict({"k": 1}, "d.yaml")
        run.log_image(np.zeros((4, 4, 3), np.uint8), "i.png")
        run.log_image(np.zeros((4, 4, 3), np.uint8), key="dogs", step=np.int64(2))
        with pytest.raises(TrackingError, match="cannot log"):
            run.log_artifact(outside)
    client = MlflowClient()
    found = client.get_run(run.run_id)
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.tags["mlflow.note.content"] == "why"
    assert found.data.tags["n"] == "3"
    assert found.data.params == {"rate": "0.1", "shape": "(1, 2)", "name": "None"}
    assert found.data.metrics == {"loss": 1 / 3, "final": 0.75}
    points = client.get_metric_history(run.run_id, "final")
    assert [(p.value, p.step) for p in sorted(points, key=lambda p: p.value)] == [
        (0.25, 0),
        (0.75, 0),
    ]
    names = {f.path for f in client.list_artifacts(run.run_id)}
    assert names == {"data.txt", "deep", "inner.txt", "a", "d.yaml", "i.png", "images"}
    assert artifact(run.run_id, "data.txt") == "kept"
    assert artifact(run.run_id, "deep/folder/inner.txt") == "kept too"
    assert artifact(run.run_id, "d.yaml") == "k: 1\n"
    assert list((run.folder / "staged").iterdir()) == []  # uploaded, so deleted
    expected = {"version", "lease", "git_dirty"}
    assert {name.removeprefix("tunix_mlflow.") for name in ours(run.run_id)} <= expected


def test_a_value_that_is_no_number_is_named_once(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And the good values of the same call are kept, every time."""
    bad = {"none": None, "text": "0.5", "nan": math.nan, "inf": -math.inf, "many": [1.0, 2.0]}
    with caplog.at_level(logging.WARNING, "tunix_mlflow"), started() as run:
        for step in range(3):
            run.log_metrics({"good": step, **bad}, step=step)
    messages = [r.getMessage() for r in caplog.records if r.name == "tunix_mlflow"]
    assert len(messages) == len(bad)
    for key in bad:
        assert len([m for m in messages if f"'{key}'" in m]) == 1
    client = MlflowClient()
    assert client.get_run(run.run_id).data.metrics == {"good": 2.0}
    assert len(client.get_metric_history(run.run_id, "good")) == 3


def test_numpy_and_jax_numbers_are_taken(store: str) -> None:
    """As values and as steps; a step that is no integer is refused."""
    values = [np.float32(0.5), jnp.float32(0.5), np.array([0.5]), Decimal("0.5"), jnp.array(0.5)]
    steps = [np.int64(1), jnp.int32(2), np.array(3), 4.0, np.uint8(5)]
    with started() as run:
        for value, step in zip(values, steps, strict=True):
            run.log_metrics({"x": value}, step=step)
        run.log_metric("flag", True)
        with pytest.raises(TrackingError, match="expected an integer"):
            run.log_metric("x", 1.0, step=2.5)  # type: ignore[arg-type]
    found = MlflowClient().get_metric_history(run.run_id, "x")
    assert sorted((m.step, m.value) for m in found) == [(n, 0.5) for n in range(1, 6)]


def test_our_run_is_mlflows_active_run(store: str) -> None:
    """What MLflow's fluent functions log lands there; after the block nothing is active."""
    with started() as run:
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.run_id
        mlflow.log_metric("theirs", 2.0)
        mlflow.log_text("x", "theirs.txt")
    assert mlflow.active_run() is None
    last = mlflow.last_active_run()
    assert last is not None
    assert last.info.run_id == run.run_id
    found = MlflowClient().get_run(run.run_id)
    assert found.data.metrics["theirs"] == 2.0
    assert found.info.status == "FINISHED"
    with mlflow.start_run() as other:
        pass
    assert other.info.run_id != run.run_id
    with started() as ended:
        mlflow.end_run()  # of the user's; the block's status counts
    assert mlflow.active_run() is None
    assert MlflowClient().get_run(ended.run_id).info.status == "FINISHED"
    with pytest.raises(TrackingError, match="has ended"):
        run.log_metric("late", 1.0)


def test_a_run_begins_at_the_call(store: str) -> None:
    """Without a block, `end` ends it; a second call does nothing."""
    run = started()
    assert MlflowClient().get_run(run.run_id).info.status == "RUNNING"
    assert run.end()
    assert run.end("FAILED")
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


def test_two_threads_have_a_run_each(store: str) -> None:
    """Side by side, each with its own points, and neither the other's child."""
    both = threading.Barrier(2)
    made: dict[str, str] = {}

    def loop(name: str) -> None:
        with started(run_name=name) as run:
            made[name] = run.run_id
            both.wait(30)
            for step in range(5):
                mlflow.log_metric(name, step, step=step)
                run.log_metric("own", step, step=step)
            both.wait(30)

    threads = [threading.Thread(target=loop, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, run_id in made.items():
        found = MlflowClient().get_run(run_id)
        assert set(found.data.metrics) == {name, "own"}
        assert "mlflow.parentRunId" not in found.data.tags
        assert found.info.status == "FINISHED"


def test_environment_and_signals_are_as_before(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_HTTP_REQUEST_* are set where unset, until the last of two runs ends."""
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    monkeypatch.setenv(names[1], "77")
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    first, second = started(), started()
    assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {names[0]: "1"}
    first.end()
    assert os.environ[names[0]] == "1"
    second.end()
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert mlflow.active_run() is None


def test_the_experiment_is_mlflows_choice(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID, or what the call says."""
    client = MlflowClient()
    number = client.create_experiment("by-id")

    def name(**more: str) -> str:
        with started(**more) as run:
            pass
        return str(client.get_experiment(run.experiment_id or "").name)

    assert name() == "tunix-mlflow"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert name() == "by-id"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-name")
    assert name() == "by-name"
    assert name(experiment="said") == "said"
    assert name(experiment_id=number) == "by-id"
    with pytest.raises(TrackingError, match="experiment 12345"):
        name(experiment_id="12345")


def test_a_key_continues_the_unfinished_run(store: str) -> None:
    """Points that are there are not doubled; a finished run is left alone."""
    with pytest.raises(TrackingError, match="needs the key"):
        started(resume=True)
    with pytest.raises(ValueError, match="boom"), started(key="job", resume=True) as first:
        first.log_metric("loss", 1.0, step=1)
        first.log_metric("other", 1.0, step=1)
        raise ValueError("boom")
    with started(key="job", resume=True) as second:
        second.log_metric("loss", 1.0, step=1)
        second.log_metric("other", 2.0, step=1)
        second.log_metric("loss", 0.5, step=2)
    assert second.run_id == first.run_id
    client = MlflowClient()
    found = client.get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert "tunix_mlflow.error" not in found.data.tags
    history = client.get_metric_history(first.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5)]
    assert found.data.metrics["other"] == 2.0
    with started(key="job", resume=True) as third:
        pass
    assert third.run_id != first.run_id
    with started(run_id=first.run_id) as again:
        again.log_metric("late", 1.0)
    assert again.run_id == first.run_id


def test_git_tells_the_commit(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the main script's work tree, or of the current folder's; and whether it was changed."""
    tree = tmp_path / "tree"
    tree.mkdir()

    def git(*words: str) -> str:
        author = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        done = subprocess.run(
            ["git", *author, *words], cwd=tree, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tree / "main.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "nowhere.py")])
    assert git_tags() == (None, None)
    monkeypatch.setattr("sys.argv", [str(tree / "main.py")])
    assert git_tags() == (commit, "false")
    (tree / "untracked").write_text("")
    assert git_tags() == (commit, "false")
    (tree / "main.py").write_text("2")
    assert git_tags() == (commit, "true")
    monkeypatch.setattr("sys.argv", [""])
    monkeypatch.chdir(tree)
    assert git_tags() == (commit, "true")


def git_tags() -> tuple[str | None, str | None]:
    with started() as run:
        pass
    tags = MlflowClient().get_run(run.run_id).data.tags
    assert tags["mlflow.user"]
    return tags.get("mlflow.source.git.commit"), tags.get("tunix_mlflow.git_dirty")


def test_a_parameter_that_differs_is_named(store: str, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps its first value, as in MLflow; the others of the call are recorded."""
    with caplog.at_level(logging.WARNING, "tunix_mlflow"), started() as run:
        run.log_params({"a": 1})
        run.log_params({"a": 2, "b": 3})
    assert MlflowClient().get_run(run.run_id).data.params == {"a": "1", "b": "3"}
    assert "a is '1' already, not '2'" in caplog.text


def test_a_run_that_nobody_ended_ends_with_the_process(store: str) -> None:
    """FINISHED at the end of a script, FAILED after an error that nobody caught."""
    ways = (("", "FINISHED"), ("raise ValueError('bug')", "FAILED"))
    processes = []
    for line, _ in ways:
        code = "import tunix_mlflow.tracking.run as t\n"
        code += f"print(t.start_run(log_system_metrics=False).run_id)\n{line}\n"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process, (_, status) in zip(processes, ways, strict=True):
        out, err = process.communicate(timeout=240)
        run = MlflowClient().get_run(out.split()[-1])
        assert run.info.status == status, err
    assert run.data.tags["tunix_mlflow.error"] == "bug"


def test_a_launcher_of_another_run_says_so(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that `mlflow run` made to continue another is tagged, and ends as that one."""
    client = MlflowClient()
    with pytest.raises(ValueError, match="boom"), started(key="job", resume=True) as first:
        raise ValueError("boom")
    for more in ({"run_id": first.run_id}, {"key": "job", "resume": True}):
        launcher = client.create_run("0").info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", launcher)
        with pytest.raises(KeyboardInterrupt), started(**more) as run:
            raise KeyboardInterrupt
        assert run.run_id == first.run_id
        found = client.get_run(launcher)
        assert found.data.tags["tunix_mlflow.launcher_of"] == first.run_id
        assert found.info.status == "KILLED"
    monkeypatch.setenv("MLFLOW_RUN_ID", launcher)
    with pytest.raises(TrackingError):
        started(run_id="0" * 32)
    assert os.environ["MLFLOW_RUN_ID"] == launcher  # so that whoever reports it finds it


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
        event_log.move_cursor(
            run.folder, event_log.Cursor()
        )  # as if a process had died before this
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


def test_a_key_is_found_while_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Begun and continued with the server away, it is one run in MLflow."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.1)
    mlflow.set_tracking_uri(f"http://127.0.0.1:{dead_port()}")
    with pytest.raises(ValueError, match="boom"), started(key="job", resume=True) as first:
        first.log_metric("loss", 1.0, step=1)
        raise ValueError("boom")
    with started(key="job", resume=True) as second:
        second.log_metric("loss", 0.5, step=2)
    assert second.folder == first.folder
    with pytest.raises(UnavailableError, match="is not on this machine"):
        started(run_id="0" * 32)
    mlflow.set_tracking_uri(store)
    with started(key="job", resume=True) as third:
        assert third.folder != first.folder  # that one has finished
    upload.sync(MlflowClient(), first.folder, print)
    found = MlflowClient().get_run(first.run_id)
    assert found.info.status == "FINISHED"
    history = MlflowClient().get_metric_history(first.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5)]


def test_offline_records_in_a_store_of_its_own(store: str) -> None:
    """tracking.offline=true touches no server."""
    offline = TrackingConfig(offline=True, system_metrics=False)
    with opened(offline) as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    found = MlflowClient(paths.offline_tracking_uri()).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/loss"] == 1.0
    assert MlflowClient(store).search_runs(["0"]) == []


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
        resume.to_resume("0" * 32)
    with mlflow.start_run() as other:
        pass
    with pytest.raises(TrackingError, match="not a training run of ours"):
        resume.to_resume(other.info.run_id)
    with opened(tags={DIGEST: "a" * 64}) as run:
        run.write_file("config.json", to_json(Config()))
        run.write_file("environment.json", b"{}")
    with pytest.raises(TrackingError, match="has finished"):
        resume.to_resume(run.run_id)


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
    (message,) = said
    assert "'what#is' are not recorded" in message


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
    real = delivery.deliver_next

    def broken(*words: Any) -> bool:
        raise ConnectionError("away")

    with (
        pytest.raises(Interrupted),
        opened(report=reports.append) as run,
    ):
        run.sync()
        monkeypatch.setattr(delivery, "deliver_next", broken)
        run.log_metrics({"train/loss": 1.0}, 1)
        raise Interrupted(signal.SIGTERM)
    assert "nothing is lost" in reports[-1]
    monkeypatch.setattr(delivery, "deliver_next", real)
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
        run.log_metrics({"train/loss": 1.0, "perf/step_time_ms": 3.0}, 1)
        assert run.log_summary(1)["avg_throughput"] == 0.0


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
