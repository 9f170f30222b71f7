"""Going on with a run: from any step, with more of them, elsewhere, as another; and what is not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import (
    ROOT,
    BeginFrom,
    environment,
    last_json,
    run_here,
    signalled,
    tiny,
    write_traces,
)
from tunix_mlflow import paths
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config, TrackingConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import CheckpointError, ConfigError, Interrupted, UnavailableError
from tunix_mlflow.pipelines.resume import ResumePoint
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.run import open_run
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.runs import resume as resuming
from tunix_mlflow.tracking.sync import lease
from tunix_mlflow.training import checkpoint


def config(**more: str) -> Config:
    small = {"dataset": "doubles-v1", "training__steps": "8", "evaluation__samples": "0"}
    return load_config(None, tiny(**(small | more)))


@pytest.fixture
def doubles(tmp_path: Path, store: str) -> str:
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    return "doubles-v1"


class Recorded(NamedTuple):
    """Two runs of the same configuration in a store of their own."""

    whole: str
    killed: str  # after step 5


@pytest.fixture
def recorded(begin_from: BeginFrom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorded:
    def make() -> Recorded:
        datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
        return Recorded(train(config()).run_id, interrupted(monkeypatch, 5))

    return begin_from("recorded", make)


@pytest.fixture
def finished(begin_from: BeginFrom, tmp_path: Path) -> str:
    """The only run of a store of its own."""

    def make() -> str:
        datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
        return train(config()).run_id

    return begin_from("finished", make)


class Said:
    """A reporter that keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    def progress(self, *_: object) -> None:
        pass


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, **more: str) -> str:
    """The id of a run that a SIGTERM ended after so many steps."""
    with signalled(monkeypatch, signal.SIGTERM, at), pytest.raises(Interrupted):
        train(config(**more))
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run, *_) = client.search_runs(experiments, order_by=["attributes.start_time DESC"])
    assert run.info.status == "KILLED"
    return str(run.info.run_id)


def weights(run_id: str) -> str:
    return str(MlflowClient().get_run(run_id).data.tags["tunix_mlflow.weights_digest"])


def losses(run_id: str) -> list[tuple[int, float]]:
    found = MlflowClient().get_metric_history(run_id, "train/loss")
    return sorted((m.step, m.value) for m in found)


def stamps(run_id: str) -> set[tuple[int, int]]:
    found = MlflowClient().get_metric_history(run_id, "train/loss")
    return {(m.step, m.timestamp) for m in found}


def test_from_an_earlier_step(finished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later checkpoints are put aside and made anew; the run ends as if nothing had been."""
    run_id = interrupted(monkeypatch, 7)
    done = train(config(), resume=ResumePoint(run_id, step=4))
    assert done.run_id == run_id
    assert weights(run_id) == weights(finished)
    assert losses(run_id) == losses(finished)
    folder = paths.run_dir(run_id) / "checkpoints"
    assert {p.name for p in (folder / "superseded").iterdir()} == {*("00000006.0", "00000007.0")}


def test_more_steps(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run goes on when it is given more steps, and only then. That the schedule is
    stretched is told, and may be chosen otherwise."""
    run_id = finished
    assert run_here("resume", run_id) == 2
    capsys.readouterr()
    words = ("training.eval_every_steps=3", "optimizer.schedule_steps=8")
    assert run_here("resume", run_id, "training.steps=10", *words) == 0
    assert "schedule" not in capsys.readouterr().err
    words = ("training.eval_every_steps=3", "optimizer.schedule_steps=null")
    assert run_here("resume", run_id, "training.steps=12", *words) == 0
    assert "training.steps=12 changes the schedule: update 10 had" in capsys.readouterr().err
    assert [step for step, _ in losses(run_id)] == list(range(1, 13))
    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["total_steps"] == 12
    kept = Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="config.json"))
    assert json.loads(kept.read_text())["training"]["steps"] == 12


def test_a_fork_is_a_run_of_its_own(finished: str) -> None:
    """It begins where the other was, may change anything, and leaves the other as it was."""
    before = losses(finished)
    words = ("resume", finished, "--step", "4", "--fork", "optimizer.learning_rate=0.01")
    assert run_here(*words) == 0
    client = MlflowClient()
    experiment = client.get_run(finished).info.experiment_id
    (fork,) = client.search_runs([experiment], f"tags.`tunix_mlflow.forked_from` = '{finished}@4'")
    assert [step for step, _ in losses(fork.info.run_id)] == [5, 6, 7, 8]
    assert losses(finished) == before
    assert fork.data.params["optimizer.learning_rate"] == "0.01"


def test_elsewhere(recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing but the id: configuration, history and checkpoint come from MLflow."""
    run_id = recorded.killed
    points = {
        (m.step, m.timestamp) for m in MlflowClient().get_metric_history(run_id, "train/loss")
    }
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "elsewhere"))
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    assert run_here("resume", run_id) == 0
    assert weights(run_id) == weights(recorded.whole)
    assert losses(run_id) == losses(recorded.whole)
    now = stamps(run_id)
    assert points < now
    assert len(now) == 8


def test_a_damaged_upload_is_not_used(recorded: Recorded, capsys: Any) -> None:
    """The one before it is."""
    run_id = recorded.killed
    client = MlflowClient()
    place = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    victim = next((place / "checkpoints" / "00000005" / "state").rglob("*/d/*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    shutil.rmtree(paths.run_dir(run_id))
    assert run_here("resume", run_id) == 0
    said = capsys.readouterr().err
    assert "uploaded checkpoint of step 5 is damaged" in said
    assert "fetched the checkpoint of step 4" in said
    assert weights(run_id) == weights(recorded.whole)


def test_by_key(doubles: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """The same command begins a run, goes on with it after a death, and then has nothing to do."""
    run_id = interrupted(monkeypatch, 5, tracking__key="job-17")
    file = tmp_path / "job.yaml"
    file.write_bytes(to_json(config()))
    again = ("train", str(file), "--resume", "auto", "tracking.key=job-17")
    assert run_here(*again, "seed=3") == 2
    assert "seed: 0, now 3" in capsys.readouterr().err
    assert run_here(*again) == 0
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    capsys.readouterr()
    assert run_here(*again) == 0
    assert json.loads(capsys.readouterr().out) == {"run_id": run_id, "finished": True}
    assert run_here(*again, "seed=3") == 2  # not the run that was asked for, finished or not
    assert "seed: 0, now 3" in capsys.readouterr().err
    assert run_here(*again, "training.steps=10") == 0
    assert [step for step, _ in losses(run_id)] == list(range(1, 11))
    assert run_here("train", "--resume", "auto") == 2


WRONG = {
    "no such run": ("0" * 32,),
    "no id": ("../../etc",),
    "another program's": ("OTHER",),
    "not a training": ("SEED",),
    "a launcher": ("LAUNCHER",),
    "deleted": ("DELETED",),
    "finished": ("FINISHED",),
    "other optimizer": ("RUN", "optimizer.learning_rate=0.5"),
    "other order": ("RUN", "seed=9"),
    "other batches": ("RUN", "training.batch_size=2"),
    "other model": ("RUN", "model.width=32"),
    "other data": ("RUN", "dataset=other-v1"),
    "other tokenizer": ("TOKENIZER",),
    "no such step": ("RUN", "--step", "3"),
    "a preset": ("RUN", "column-addition"),
    "fewer than done": ("RUN", "--step", "-1"),
}


@pytest.fixture
def targets(recorded: Recorded, tmp_path: Path) -> dict[str, str]:
    client = MlflowClient()
    run_id = recorded.killed
    experiment = client.get_run(run_id).info.experiment_id
    found = {"RUN": run_id, "FINISHED": recorded.whole}
    datasets.ingest(write_traces(tmp_path / "other.jsonl", 70), "other-v1")
    for name in ("OTHER", "SEED", "LAUNCHER", "DELETED", "TOKENIZER"):
        found[name] = client.create_run(experiment).info.run_id
    ours = client.get_run(run_id).data.tags
    for key, value in ours.items():
        if key.startswith("tunix_mlflow.") and key != tags.LEASE:
            for name in ("LAUNCHER", "DELETED", "TOKENIZER"):
                client.set_tag(found[name], key, value)
    for name in ("config.json", "environment.json"):
        client.log_artifact(found["TOKENIZER"], str(paths.run_dir(run_id) / name))
    client.set_tag(found["SEED"], "tunix_mlflow.stage", "seed")
    client.set_tag(found["LAUNCHER"], "tunix_mlflow.launcher_of", run_id)
    client.set_tag(found["TOKENIZER"], "tunix_mlflow.tokenizer_digest", "f" * 64)
    client.delete_run(found["DELETED"])
    return found


def everything() -> tuple[Any, set[str]]:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, run_view_type=3)
    told = sorted(
        (r.info.run_id, r.info.status, str(r.data.tags), str(r.data.metrics)) for r in found
    )
    return told, {str(p) for p in paths.run_dir("").rglob("*")}


def test_wrong_targets_are_refused(targets: dict[str, str], capsys: Any) -> None:
    """One line and exit code 2 each; MLflow and the state root are as they were."""
    before = everything()
    for what, (target, *words) in WRONG.items():
        capsys.readouterr()
        code = run_here("resume", targets.get(target, target), *words)
        said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert (code, len(said)) == (2, 1), (what, said)
        assert everything() == before, what
    print(f"{len(WRONG)} of {len(WRONG)} wrong targets refused")


def test_the_difference_is_named(targets: dict[str, str], capsys: Any) -> None:
    """Which key, what it was and what it would be."""
    run_here("resume", targets["RUN"], "optimizer.learning_rate=0.5", "seed=9")
    said = capsys.readouterr().err
    assert "seed: 0, now 9; optimizer.learning_rate: 0.001, now 0.5" in said
    run_here("resume", targets["RUN"], "dataset=other-v1")
    assert "another dataset_digest" in capsys.readouterr().err


def test_a_run_that_is_open_elsewhere(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that is renewed keeps others out; one that ends is waited for."""
    run_id = recorded.killed
    client = MlflowClient()
    looks = 0

    def look(seconds: float) -> None:  # the holder renews while the other waits
        nonlocal looks
        looks += 1
        client.set_tag(run_id, tags.LEASE, f"somebody {int(1000 * (time.time() + 60 + looks))}")

    client.set_tag(run_id, tags.LEASE, f"somebody {int(1000 * (time.time() + 60))}")
    with monkeypatch.context() as patched:
        patched.setattr("tunix_mlflow.tracking.sync.lease.time.sleep", look)
        with pytest.raises(UnavailableError, match="open in another process, elsewhere"):
            train(config(), resume=ResumePoint(run_id))
    client.set_tag(run_id, tags.LEASE, f"somebody {int(1000 * (time.time() + 1))}")
    assert train(config(), resume=ResumePoint(run_id)).run_id == run_id


def test_a_lease_of_a_wrong_clock(recorded: Recorded) -> None:
    """A machine whose clock was a day ahead has died: another one waits for the length of the
    lease and no longer; with a reason to take the run over it does not wait, and says so."""
    run_id, client = recorded.killed, MlflowClient()
    tomorrow = int(1000 * (time.time() + 24 * 3600))
    client.set_tag(run_id, tags.LEASE, f"somebody {tomorrow} 2")
    begun, said = time.monotonic(), Said()
    assert train(config(), resume=ResumePoint(run_id), reporter=said).run_id == run_id
    assert time.monotonic() - begun < 60
    assert "waiting 2 s for its lease" in "".join(said.messages)


def test_a_run_is_taken_over(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """resume --take-over REASON does not wait for a lease, and leaves the reason on the run."""
    run_id, client = recorded.killed, MlflowClient()

    def wait(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(lease, "_wait_for", wait)
    client.set_tag(run_id, tags.LEASE, f"somebody {int(1000 * (time.time() + 900))} 900")
    assert run_here("resume", run_id, "--take-over", "the machine burnt down") == 0
    assert client.get_run(run_id).data.tags[tags.TAKEN_OVER] == "the machine burnt down"


def test_a_model_of_a_checkpoint(finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A fork with as many steps as its checkpoint has trains nothing, and logs that model."""
    sealed = checkpoint.sealed_checkpoints(paths.run_dir(finished) / "checkpoints")
    step = int(sealed[0].name)
    assert step < 8
    words = ("--step", str(step), "--fork", f"training.steps={step}")
    assert run_here("resume", finished, *words) == 0
    found = last_json(capsys.readouterr().out)
    assert found["run_id"] != finished
    model = MlflowClient().get_logged_model(found["model_id"])
    assert model.tags[tags.STEP] == str(step)


def test_a_run_that_was_taken_over_stops_writing(store: str) -> None:
    """Silent for too long, and another process has it: this one stops, and its status is not
    put over the other's."""
    quiet = TrackingConfig(system_metrics=False, lease_seconds=2)
    client = MlflowClient()
    with (
        pytest.raises(UnavailableError, match="lease lost to another process"),
        open_run(stage="train", tracking=quiet, report=lambda _: None) as run,
    ):
        run.sync()
        client.set_tag(run.run_id, tags.LEASE, f"somebody {int(1000 * (time.time() + 60))}")
        for step in range(400):
            run.log_metrics({"train/loss": 1.0}, step)
            time.sleep(0.02)
    assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_long_upload_keeps_the_lease(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread is busy with a file, another one renews."""
    quiet = TrackingConfig(system_metrics=False, lease_seconds=2)
    client, entered, uploaded = MlflowClient(), threading.Event(), threading.Event()
    send = MlflowClient.log_artifact

    def slowly(self: MlflowClient, run_id: str, path: str, *rest: str) -> None:
        if path.endswith("large"):
            entered.set()
            uploaded.wait(60)
        send(self, run_id, path, *rest)

    monkeypatch.setattr(MlflowClient, "log_artifact", slowly)
    with open_run(stage="train", tracking=quiet, report=lambda _: None) as run:
        run.log_text("much", "large")
        assert entered.wait(60)
        begun = time.time()
        while time.time() < begun + 5:
            assert not lease.expired(client.get_run(run.run_id).data.tags)
            time.sleep(0.2)
        uploaded.set()
    assert lease.expired(client.get_run(run.run_id).data.tags)


def test_a_death_without_a_word_is_marked(finished: str) -> None:
    """The next training in the experiment finds the run, and gives it its status."""
    client = MlflowClient()
    dead = finished
    client.update_run(dead, status="RUNNING")
    client.set_tag(dead, tags.LEASE, f"somebody {int(1000 * (time.time() - 1))}")
    alive = client.create_run(client.get_run(dead).info.experiment_id).info.run_id
    train(config(seed="5"))
    found = client.get_run(dead)
    assert found.info.status == "KILLED"
    assert f"tunix-mlflow resume {dead}" in found.data.tags["tunix_mlflow.error"]
    assert client.get_run(alive).info.status == "RUNNING"  # not one of ours


def test_the_launcher_of_a_resume_is_no_ghost(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The run that `mlflow run` made says whose it is, has no metrics, ends as that one does, and
    is in none of our lists."""
    run_id = recorded.killed
    client = MlflowClient()
    launcher = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launcher)
    train(config(), resume=ResumePoint(run_id))
    found = client.get_run(launcher)
    assert found.info.status == client.get_run(run_id).info.status == "FINISHED"
    assert found.data.tags["tunix_mlflow.launcher_of"] == run_id
    assert (found.data.metrics, found.data.params) == ({}, {})
    capsys.readouterr()
    assert run_here("runs", "list", "--json") == 0
    listed = {row["run_id"] for row in json.loads(capsys.readouterr().out)}
    assert listed == {run_id, recorded.whole}


def test_verify_proves_a_run(finished: str, capsys: Any) -> None:
    """The last segment is trained again; a value that was changed is found; the verdict stays."""
    run_id = finished
    client = MlflowClient()
    assert run_here("runs", "verify", run_id) == 0
    tag = client.get_run(run_id).data.tags["tunix_mlflow.verified"]
    assert tag.startswith("ok: steps 7 to 8 trained again")
    shutil.rmtree(paths.run_dir(run_id))  # by what MLflow has alone
    assert run_here("runs", "verify", run_id, "--json") == 0
    client.log_metric(run_id, "train/loss", 0.5, step=8)
    capsys.readouterr()
    assert run_here("runs", "verify", run_id) == 3
    assert "train/loss at step 8: recorded" in capsys.readouterr().err
    assert client.get_run(run_id).data.tags["tunix_mlflow.verified"].startswith("differs: ")


def test_verify_notices_another_state(finished: str) -> None:
    """A checkpoint that holds something else than training would give."""
    from tunix_mlflow.models import arrays

    run_id = finished
    folder = checkpoint.sealed_checkpoints(paths.run_dir(run_id) / "checkpoints")[-1]
    other = train(config(seed="3")).run_id
    wrong = checkpoint.sealed_checkpoints(paths.run_dir(other) / "checkpoints")[-1]
    content = {k: v for k, v in arrays.content(folder).items() if k != "files"}
    stranger = arrays.content(wrong)["state_digest"]
    shutil.rmtree(folder / "state")
    shutil.copytree(wrong / "state", folder / "state")
    (folder / arrays.MANIFEST).unlink()
    arrays.seal(folder, content | {"state_digest": stranger})
    assert run_here("runs", "verify", run_id) == 3


def test_need_of_a_checkpoint(finished: str) -> None:
    """What there is is listed."""
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are: 4, 6, 8"):
        resuming.need_checkpoint(lookup.look_up(finished, print), 3, lambda _: None)


def test_fewer_steps_than_are_done_are_refused(recorded: Recorded) -> None:
    """No model of a step that it is not of is logged; the run can still be resumed."""
    run_id = recorded.killed
    with pytest.raises(ConfigError, match=r"training.steps=3, but step \d is done"):
        train(config(training__steps="3"), resume=ResumePoint(run_id))
    train(config(), resume=ResumePoint(run_id))
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"


def test_a_key_that_is_newer_than_a_run(recorded: Recorded, tmp_path: Path) -> None:
    """A version with more keys, each with a default, resumes a run of before to the same bits; the
    run's digests stay, and its config.json has the keys from then on."""
    run_id = recorded.killed
    before = MlflowClient().get_run(run_id).data.tags
    shutil.copytree(ROOT / "tunix_mlflow", tmp_path / "newer" / "tunix_mlflow")
    schema = tmp_path / "newer" / "tunix_mlflow" / "config" / "schema.py"
    text = schema.read_text()
    for line in ("    steps: Positive = 200\n", "    dataset: str | None = None\n"):
        assert text.count(line) == 1
        text = text.replace(line, f"    added: int = 7\n{line}")
    schema.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tunix_mlflow.cli.main", "resume", run_id],
        cwd=tmp_path / "newer",
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert weights(run_id) == weights(recorded.whole)
    assert losses(run_id) == losses(recorded.whole)
    for tag in (tags.CONFIG_DIGEST, f"{tags.PREFIX}trajectory_digest"):
        assert run.data.tags[tag] == before[tag]
    now = json.loads((paths.run_dir(run_id) / "config.json").read_text())
    assert (now["added"], now["training"]["added"]) == (7, 7)
