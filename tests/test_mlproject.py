"""The project as its users run it: real `mlflow run`, real kills, real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.conftest import (
    BIN,
    ROOT,
    as_arguments,
    as_parameters,
    environment,
    last_json,
    tiny,
    write_traces,
)
from tunix_mlflow import start_run
from tunix_mlflow.errors import TrackingError

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> str:
    """The project as a git URI: what would be committed now."""
    tree = tmp_path / "project"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    for name in names or ["MLproject"]:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=tree, check=True)
    return f"file://{tree}"


def mlflow_run(
    command: Command, entry: str, parameters: dict[str, str], uri: str = str(ROOT)
) -> subprocess.CompletedProcess[str]:
    version = ["-v", "main"] if uri.startswith("file://") else []
    return command(
        *("mlflow", "run", uri, *version, "-e", entry, "--env-manager", "local"),
        *as_parameters(parameters),
    )


def runs() -> list[Run]:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    found: list[Run] = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return found


def test_every_entry_point(store: str, command: Command, project: str, tmp_path: Path) -> None:
    """seed, train, evaluate, promote, bench, from another folder, one of them by a git URI."""
    done = mlflow_run(command, "seed", {"dataset": "golden-v1"}, project)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["examples"] == 5

    # golden-v2 is not in the catalog: seeded on first use, and said so.
    small = tiny(dataset="golden-v2", evaluation__samples="1")
    done = mlflow_run(command, "train", small)
    assert done.returncode == 0, done.stderr
    assert "seeded golden-v2: 100 examples" in done.stderr
    trained = last_json(done.stdout)
    run = MlflowClient().get_run(trained["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == "4"
    assert run.data.params["optimizer.name"] == "muon"  # from the preset

    few = {
        "model": trained["model_id"],
        "dataset": "golden-v2",
    }
    done = mlflow_run(command, "evaluate", few | {"evaluation.max_new_tokens": "4"})
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["examples"] == 10

    gate = {"model": trained["run_id"], "name": "golden"}
    done = mlflow_run(command, "promote", gate | {"promotion.thresholds.exact_match": "0"})
    assert done.returncode == 0, done.stderr
    assert MlflowClient().get_registered_model("golden").aliases.keys() == {
        "challenger",
        "champion",
    }

    done = mlflow_run(
        command,
        "bench",
        tiny(dataset="golden-v2", benchmark__steps="2", benchmark__repeats="2"),
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["tokens_per_sec"] > 0
    assert [r.info.status for r in runs()] == ["FINISHED"] * 5
    assert list(Path.cwd().iterdir()) == []


def test_main_links_its_stages(store: str, command: Command) -> None:
    """One parent, four children in one process, each FINISHED; the model promoted."""
    small = tiny(
        dataset="golden-v2",
        promotion__model="golden",
        promotion__thresholds__exact_match="0",
    )
    done = mlflow_run(command, "main", small)
    assert done.returncode == 0, done.stderr
    figures = last_json(done.stdout)
    assert figures["version"] == "1"
    everything = runs()
    parents = [r for r in everything if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_id for r in parents] == [figures["run_id"]]
    children = [r for r in everything if r not in parents]
    assert [r.data.tags["tunix_mlflow.stage"] for r in children] == [
        "seed",
        "train",
        "evaluate",
        "promote",
    ]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {figures["run_id"]}
    assert {r.info.status for r in everything} == {"FINISHED"}


@pytest.mark.parametrize(
    ("entry", "parameters", "message"),
    [
        ("train", {"training.steps": "many"}, "training.steps: expected int, got 'many'"),
        ("evaluate", {"model": "m-1", "dataset": "absent-v1"}, "dataset 'absent-v1' is not in"),
    ],
)
def test_a_users_mistake_is_one_line(
    store: str, command: Command, entry: str, parameters: dict[str, str], message: str
) -> None:
    """Non-zero, no traceback, the run FAILED with the message in a tag, none left RUNNING."""
    done = mlflow_run(command, entry, parameters)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("tunix-mlflow: error:")]
    assert len(ours) == 1
    assert message in ours[0]
    assert "Traceback" not in done.stderr
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert message in run.data.tags["tunix_mlflow.error"]
    assert run.data.metrics == {}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "tunix-mlflow"), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], home: Path, step: int) -> Path:
    """The folder of the only run, once its metrics log has come to a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for log in home.glob("runs/*/metrics.jsonl"):
            if f'"step": {step},' in log.read_text():
                return log.parent
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


LONG = tiny(
    dataset="golden-v2",
    training__steps="60",
    training__eval_every_steps="20",
    training__save_every_steps="10",
)


def history(run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient()
    keys = [
        k for k in client.get_run(run_id).data.metrics if k.startswith(("train/", "validation/"))
    ]
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        for key in keys
    }


def open_again(run_id: str) -> None:
    with start_run(run_id=run_id, resume=True):
        raise AssertionError


def test_killed_and_resumed_is_bit_identical(store: str, command: Command, home: Path) -> None:
    """SIGKILL, then SIGTERM, then to the end: the same MLflow run, the same parameters to the
    bit, each metric point once and the same as in an uninterrupted run."""
    done = command("tunix-mlflow", "train", *as_arguments(LONG))
    assert done.returncode == 0, done.stderr
    uninterrupted = last_json(done.stdout)["run_id"]
    shutil.rmtree(home / "runs")
    client = MlflowClient()

    process = start("train", *as_arguments(LONG))
    folder = wait_for_step(process, home, 25)
    with pytest.raises(TrackingError, match="open in another process"):
        open_again(folder.name)
    process.kill()
    process.communicate()
    assert client.get_run(folder.name).info.status == "RUNNING"
    process = start("resume", folder.name)
    assert wait_for_step(process, home, 45) == folder
    process.terminate()
    assert "resuming run" in process.communicate()[1]
    assert process.returncode == 143
    assert client.get_run(folder.name).info.status == "KILLED"
    done = command("tunix-mlflow", "resume", folder.name)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["run_id"] == folder.name

    resumed, reference = client.get_run(folder.name), client.get_run(uninterrupted)
    assert resumed.info.status == "FINISHED"
    assert "tunix_mlflow.error" not in resumed.data.tags
    digests = {r.data.tags["tunix_mlflow.weights_digest"] for r in (resumed, reference)}
    assert len(digests) == 1
    assert history(folder.name) == history(uninterrupted)
    done = command("tunix-mlflow", "resume", folder.name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has finished" in done.stderr


def launch_project(parameters: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(str(BIN / "mlflow"), "run", str(ROOT), "-e", "train", "--env-manager", "local"),
            *as_parameters(parameters),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_child_does_not_outlive_mlflow_run(
    store: str, command: Command, home: Path, number: int
) -> None:
    """Whatever ends `mlflow run` alone, training saves and ends KILLED; -P resume continues the run
    and leaves no other one RUNNING."""
    process = launch_project(LONG | {"training.steps": "400"})
    folder = wait_for_step(process, home, 25)
    process.send_signal(number)
    process.wait(30)
    client = MlflowClient()
    deadline = time.monotonic() + 60
    while client.get_run(folder.name).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.get_run(folder.name).info.status == "KILLED"
    process.communicate()
    if number == signal.SIGKILL:
        return
    done = mlflow_run(command, "train", {"resume": folder.name})
    assert done.returncode == 0, done.stderr
    (launcher,) = [r for r in runs() if r.info.run_id != folder.name]
    assert launcher.data.tags["tunix_mlflow.launcher_of"] == folder.name
    assert launcher.data.metrics == {}
    assert launcher.info.status == client.get_run(folder.name).info.status == "FINISHED"


def test_interrupt_ends_the_run_killed(store: str, home: Path) -> None:
    """SIGINT saves, ends the run KILLED and exits 130."""
    process = start("train", *as_arguments(LONG))
    folder = wait_for_step(process, home, 12)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert f"tunix-mlflow resume {folder.name}" in err
    assert "error: interrupted by SIGINT" in err
    run = MlflowClient().get_run(folder.name)
    assert run.info.status == "KILLED"
    assert run.data.tags["tunix_mlflow.error"] == "interrupted by SIGINT"
    assert list((folder / "checkpoints").glob("*/manifest.json"))


def test_demo_keeps_to_itself(command: Command, tmp_path: Path, home: Path) -> None:
    """Whatever the environment names, everything is in ./.demo; the second time changes little."""
    elsewhere = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_EXPERIMENT_NAME": "somebody-elses",
        "TUNIX_MLFLOW_HOME": str(tmp_path / "untouched"),
    }
    small = tiny(dataset="golden-v2", promotion__thresholds__exact_match="0")
    for turn in range(2):
        done = command("tunix-mlflow", "demo", *as_arguments(small), env=elsewhere)
        assert done.returncode == 0, done.stderr
        figures = last_json(done.stdout)
        assert figures["version"] == "1"
        assert figures["verdict"] == ("was champion already" if turn else "promoted, the first")
        for word in ("dataset", "steps", "tokens/s", "final loss", "test exact match", "model"):
            assert word in done.stderr
        assert "workflowType=machine_learning" in done.stderr
    assert [p.name for p in Path.cwd().iterdir()] == [".demo"]
    assert not (tmp_path / "untouched").exists()


def test_mlproject_declares_the_six_entry_points() -> None:
    """No dotted parameter is declared, and no default is empty: MLflow breaks on both."""
    tree = yaml.safe_load((ROOT / "MLproject").read_text())
    assert set(tree["entry_points"]) == {"main", "seed", "train", "evaluate", "bench", "promote"}
    for entry in tree["entry_points"].values():
        assert entry["command"].startswith("exec python -m projects.")
        for name, parameter in entry["parameters"].items():
            assert "." not in name
            assert parameter.get("default") != ""


def test_a_closed_pipe_is_no_traceback(command: Command, home: Path) -> None:
    """`tunix-mlflow datasets list | head` ends quietly."""
    write_traces(home.parent / "a.jsonl", 3)
    command("tunix-mlflow", "datasets", "ingest", str(home.parent / "a.jsonl"), "--name", "a")
    done = subprocess.run(
        f"{BIN / 'tunix-mlflow'} datasets list --json | true",
        shell=True,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_a_script_is_the_command() -> None:
    """`python -m projects.train` reads the arguments of `tunix-mlflow train`."""
    done = subprocess.run(
        [sys.executable, "-m", "projects.train", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: tunix-mlflow train [OPTIONS] [CONFIG] [KEY=VALUE]...")


def test_results_are_json(command: Command, home: Path) -> None:
    """The last line of stdout is JSON for a program; the rest is on stderr for people."""
    done = command(
        *("tunix-mlflow", "seed", "golden-v1"), env={"MLFLOW_TRACKING_URI": f"sqlite:///{home}.db"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dataset"] == "golden-v1"
    assert Path(f"{home}.db").exists()
