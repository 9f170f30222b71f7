"""A user's run: it records exactly what they log, and leaves everything else as it was."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, environment
from tests.test_run import artifact, dead_port, ours, started
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.tracking.sync import upload, worker


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


def test_what_mlflow_never_takes_holds_nothing_up(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named, what is beside it is recorded, and the run gets its status."""
    with started() as run:
        run.log_params({"good": 1, "bad!": 2, "fine": 3})
        run.set_tags({"file": "\udc80.txt", "a" * 300: "key too long", "other": "kept"})
        stamps: tuple[Any, ...] = (1.5e12, np.int64(1_500_000_000_001), None)
        for timestamp in stamps:
            run.log_metric("loss", 1.0, timestamp=timestamp)
        with pytest.raises(TrackingError, match="step: expected an integer of 64 bits"):
            run.log_metric("loss", 1.0, step=10**20)
    client = MlflowClient()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"good": "1", "fine": "3"}
    assert (found.data.tags["file"], found.data.tags["other"]) == ("\\udc80.txt", "kept")
    assert "'bad!'" in caplog.text
    assert "'aaa" in caplog.text
    times = [point.timestamp for point in client.get_metric_history(run.run_id, "loss")]
    assert times[:2] == [1_500_000_000_000, 1_500_000_000_001]
    assert len(times) == 3


def test_a_forked_process_ends_no_run_of_its_parent(store: str) -> None:
    """Whether it leaves the block or exits; the parent records to the end of its own."""
    code = """
import gc, os, subprocess, sys
import tunix_mlflow as tm
import tunix_mlflow.errors
from tunix_mlflow.tracking.plugins.context import TunixMlflowRunContext
with tm.start_run(log_system_metrics=False) as run:
    for leave in ("exit", "end"):
        child = os.fork()
        if child == 0:
            if TunixMlflowRunContext().in_context():
                sys.exit("a run of the child's own would get our tag")
            if leave == "end":
                run.end("FAILED", "the child's")
            try:
                run.log_metric("child", 1.0)
            except tm.errors.TrackingError as error:
                assert "forked" in str(error)
                run._lock.release(force=True)
                del run
                gc.collect()
                sys.exit(0)
            sys.exit("the child recorded something")
        assert os.waitpid(child, 0)[1] == 0
        look = "import sys; from pathlib import Path; "
        look += "from tunix_mlflow.tracking.record.folder import is_open; "
        look += "sys.exit(not is_open(Path(sys.argv[1])))"
        subprocess.run([sys.executable, "-c", look, str(run.folder)], check=True)
    run.log_metric("after", 1.0)
print(run.run_id)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = MlflowClient().get_run(done.stdout.strip())
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"after": 1.0})
    assert "tunix_mlflow.error" not in found.data.tags


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
