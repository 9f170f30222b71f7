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

import mlflow
import mlflow.projects
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
    run_here,
    signalled,
    tiny,
    write_traces,
)
from tests.servers import RefusingProxy, Server
from tunix_mlflow import start_run
from tunix_mlflow.errors import UnavailableError

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


class Project:
    """`mlflow run`, launched from this process: the entry points are processes all the same."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(
        self, entry: str, parameters: dict[str, str], uri: str = str(ROOT), *, fails: bool = False
    ) -> tuple[str, str]:
        """Return what the entry point wrote to stdout and stderr."""
        self._capture.readouterr()
        try:
            mlflow.projects.run(
                uri,
                entry_point=entry,
                version="main" if uri.startswith("file://") else None,
                parameters=parameters,
                env_manager="local",
            )
            failed = False
        except mlflow.exceptions.ExecutionException:
            failed = True
        out, err = self._capture.readouterr()
        assert failed == fails, err
        return out, err


@pytest.fixture
def mlflow_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Project:
    monkeypatch.setenv("PATH", environment()["PATH"])
    return Project(capfd)


def runs() -> list[Run]:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    found: list[Run] = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return found


def test_every_entry_point(store: str, mlflow_run: Project, project: str) -> None:
    """From another folder, main by a git URI: one parent, four children in one process, the model
    promoted. Then seed, evaluate, promote and bench alone; train has tests of its own."""
    small = tiny(
        dataset="golden-v2",
        promotion__model="golden",
        promotion__thresholds__exact_match="0",
    )
    out, _ = mlflow_run("main", small, project)
    figures = last_json(out)
    assert figures["version"] == "1"
    everything = runs()
    parents = [r for r in everything if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_id for r in parents] == [figures["run_id"]]
    children = [r for r in everything if r not in parents]
    stages = {r.data.tags["tunix_mlflow.stage"]: r.info.run_id for r in children}
    assert list(stages) == ["seed", "train", "evaluate", "promote"]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {figures["run_id"]}
    note = parents[0].data.tags["mlflow.note.content"]
    assert [word for word in stages if f"[{word}](" in note] == list(stages)
    assert all(f"/runs/{r.info.run_id}" in note for r in children)

    out, _ = mlflow_run("seed", {"dataset": "golden-v1"})
    assert last_json(out)["examples"] == 5
    few = {"model": stages["train"], "dataset": "golden-v2", "evaluation.max_new_tokens": "4"}
    out, _ = mlflow_run("evaluate", few)
    assert last_json(out)["examples"] == 10
    gate = {"model": stages["train"], "name": "alone", "promotion.thresholds.exact_match": "0"}
    out, _ = mlflow_run("promote", gate)
    assert last_json(out)["verdict"] == "promoted, the first"
    for name in ("golden", "alone"):
        aliases = MlflowClient().get_registered_model(name).aliases
        assert aliases.keys() == {"challenger", "champion"}
    quick = tiny(dataset="golden-v2", benchmark__steps="2", benchmark__repeats="2")
    out, _ = mlflow_run("bench", quick)
    assert last_json(out)["tokens_per_sec"] > 0
    assert [r.info.status for r in runs()] == ["FINISHED"] * (5 + 4)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "parameters", "message"),
    [
        ("train", {"training.steps": "many"}, "training.steps: expected int, got 'many'"),
        ("evaluate", {"model": "m-1", "dataset": "absent-v1"}, "dataset 'absent-v1' is not in"),
    ],
)
def test_a_users_mistake_is_one_line(
    store: str, mlflow_run: Project, entry: str, parameters: dict[str, str], message: str
) -> None:
    """Non-zero, no traceback, the run FAILED with the message in a tag, none left RUNNING."""
    _, err = mlflow_run(entry, parameters, fails=True)
    ours = [line for line in err.splitlines() if line.startswith("tunix-mlflow: error:")]
    assert len(ours) == 1
    assert message in ours[0]
    assert "Traceback" not in err
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


@pytest.fixture
def same_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's default level by name, so that processes of ours and this one compute alike."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")


def test_killed_and_resumed_is_bit_identical(
    store: str,
    home: Path,
    same_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL, SIGTERM, SIGINT, then to the end: exit codes, statuses and messages; the same MLflow
    run, the same parameters to the bit, each metric point once and as in an uninterrupted run."""
    assert run_here("train", *as_arguments(LONG)) == 0
    uninterrupted = runs()[-1].info.run_id
    shutil.rmtree(home / "runs")
    client = MlflowClient()

    with start("train", *as_arguments(LONG)) as process:
        folder = wait_for_step(process, home, 25)  # the save of step 10 is sealed by now
        with pytest.raises(UnavailableError, match="open in process"):
            open_again(folder.name)
        process.kill()
        process.communicate()
    assert client.get_run(folder.name).info.status == "RUNNING"
    with start("resume", folder.name) as process:
        assert wait_for_step(process, home, 45) == folder
        process.terminate()
        assert "resuming run" in process.communicate()[1]
        assert process.returncode == 143
    assert client.get_run(folder.name).info.status == "KILLED"
    saved = list((folder / "checkpoints").glob("*/manifest.json"))
    assert saved

    with signalled(monkeypatch, signal.SIGINT, 3):
        assert run_here("resume", folder.name) == 130
    said = capsys.readouterr().err
    assert f"tunix-mlflow resume {folder.name}" in said
    assert "error: interrupted by SIGINT" in said
    run = client.get_run(folder.name)
    assert run.info.status == "KILLED"
    assert run.data.tags["tunix_mlflow.error"] == "interrupted by SIGINT"

    assert run_here("resume", folder.name) == 0
    assert last_json(capsys.readouterr().out)["run_id"] == folder.name
    resumed, reference = client.get_run(folder.name), client.get_run(uninterrupted)
    assert resumed.info.status == "FINISHED"
    assert "tunix_mlflow.error" not in resumed.data.tags
    digests = {r.data.tags["tunix_mlflow.weights_digest"] for r in (resumed, reference)}
    assert len(digests) == 1
    assert history(folder.name) == history(uninterrupted)
    assert run_here("resume", folder.name) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "has finished" in err


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


def test_the_child_does_not_outlive_mlflow_run(store: str, home: Path) -> None:
    """Whatever ends `mlflow run` alone, training saves and ends KILLED. -P resume continues the
    run; the one that `mlflow run` made for that says so, and ends as the other does."""
    client, endless = MlflowClient(), LONG | {"training.steps": "100000"}
    with launch_project(endless) as process:
        folder = wait_for_step(process, home, 25)
        process.terminate()
        process.wait(60)
        said = process.communicate()[0]
        assert wait_until_ended(folder.name) == "KILLED"
    # golden-v2 was not in the catalog: seeded on first use, and said so.
    assert "seeded golden-v2: 100 examples" in said
    params = client.get_run(folder.name).data.params
    assert params["training.steps"] == "100000"
    assert params["optimizer.name"] == "muon"  # from the preset
    last = history(folder.name)["train/loss"][-1][0]
    with launch_project({"resume": folder.name}) as process:
        assert wait_for_step(process, home, last + 25) == folder
        process.kill()
        process.wait(60)
        assert wait_until_ended(folder.name) == "KILLED"
        process.communicate()
    steps = [step for step, _ in history(folder.name)["train/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    (launcher,) = [r for r in runs() if r.info.run_id != folder.name]
    assert launcher.data.tags["tunix_mlflow.launcher_of"] == folder.name
    assert launcher.data.metrics == {}
    assert wait_until_ended(launcher.info.run_id) == "KILLED"


def test_what_is_refused_below_mlflow_run(
    server: Server, mlflow_run: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 4, so `mlflow run` sets FAILED over the recorded status; `sync`, when
    the cause is gone, delivers the rest and sets the true one."""
    proxy = RefusingProxy(
        server.uri, lambda method, path, length: 413 if path.endswith("/config.json") else None
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        patched.setenv("MLFLOW_EXPERIMENT_NAME", "refused-below-mlflow-run")
        mlflow.set_tracking_uri(proxy.uri)
        _, err = mlflow_run("train", tiny(dataset="golden-v2"), fails=True)
        assert "artifact config.json (413" in err
        client = MlflowClient()
        experiment = client.get_experiment_by_name("refused-below-mlflow-run")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FAILED"
        assert run.data.tags["tunix_mlflow.incomplete"] == "artifacts: 1"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
        proxy.rule = lambda method, path, length: None
        assert run_here("sync") == 0
        run = client.get_run(run.info.run_id)
        assert run.info.status == "FINISHED"
        assert "tunix_mlflow.incomplete" not in run.data.tags
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    proxy.close()


def wait_until_ended(run_id: str) -> str:
    """A run's status when it is no longer RUNNING, or after two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status = str(MlflowClient().get_run(run_id).info.status)
        if status != "RUNNING":
            break
        time.sleep(0.2)
    return status


def test_demo_keeps_to_itself(
    command: Command,
    tmp_path: Path,
    same_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever the environment names, everything is in ./.demo; the second time changes little.
    stdout is one line of JSON for a program, the rest is on stderr for people."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "somebody-elses")
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "untouched"))
    small = as_arguments(tiny(dataset="golden-v2", promotion__thresholds__exact_match="0"))

    def check(out: str, err: str, verdict: str) -> None:
        figures = json.loads(out)
        assert (figures["version"], figures["verdict"]) == ("1", verdict)
        for word in ("dataset", "steps", "tokens/s", "final loss", "test exact match", "model"):
            assert word in err
        assert "workflowType=machine_learning" in err

    done = command("tunix-mlflow", "demo", *small)
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr, "promoted, the first")
    assert run_here("demo", *small) == 0
    check(*capsys.readouterr(), "was champion already")
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


def test_a_closed_pipe_is_no_traceback(home: Path) -> None:
    """`tunix-mlflow datasets list | head` ends quietly."""
    write_traces(home.parent / "a.jsonl", 3)
    name = ("--name", "a", "--version", "v1")
    assert run_here("datasets", "ingest", str(home.parent / "a.jsonl"), *name) == 0
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
