"""The library as a user's own script, notebook and wheel use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

import tunix_mlflow as tm
from tests.conftest import ROOT, environment, tiny, write_traces
from tests.servers import Server

GUARDED = """
import os, runpy, signal, sys
handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
import jax, jax.numpy as jnp
jnp.zeros(()).block_until_ready()  # jax is loaded, and has its backend, before anything of ours
before = dict(os.environ)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert handlers == {n: signal.getsignal(n) for n in handlers}
"""

KERNEL = """
import asyncio
async def kernel():
    names = {{}}
    for cell in {cells!r}:
        exec(compile(cell, "cell", "exec"), names)
asyncio.run(kernel())
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An empty folder with a user's own JSONL."""
    folder = tmp_path / "own"
    folder.mkdir()
    write_traces(folder / "own.jsonl", 60)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment({"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def on_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tracking store of this test and its children is the server; MLflow is not silenced."""
    monkeypatch.delenv("MLFLOW_LOGGING_LEVEL")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    mlflow.set_registry_uri(server.uri)
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_server")
def test_the_script_of_the_docs(own: Path) -> None:
    """docs/own_data.py runs as it is printed there, with jax loaded first; its own two lines are
    all that is printed, and the environment and the signal handlers are as before."""
    (own / "guarded.py").write_text(GUARDED)
    done = python(own, "guarded.py", str(ROOT / "docs" / "own_data.py"), "own.jsonl", "support")
    assert (done.returncode, done.stderr) == (0, "")
    figures, promoted = done.stdout.splitlines()
    assert figures.startswith("exact match ")
    assert promoted == "support version 1: promoted, the first"
    client = MlflowClient()
    version = client.get_model_version_by_alias("support", "champion")
    run = client.get_run(str(version.run_id))
    runs = client.search_runs([run.info.experiment_id])
    stages = {run.data.tags["tunix_mlflow.stage"] for run in runs}
    assert stages == {"train", "evaluate", "promote"}


@pytest.mark.usefixtures("on_server")
def test_the_notebook_of_the_docs(own: Path) -> None:
    """The cells of docs/own_data.ipynb, one after the other, in a loop as a kernel has one."""
    notebook = json.loads((ROOT / "docs" / "own_data.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) == 5
    (own / "kernel.py").write_text(KERNEL.format(cells=cells))
    done = python(own, "kernel.py")
    assert done.returncode == 0, done.stderr
    # The last cell loads the model with mlflow.pyfunc, which shows its own progress.
    others = [line for line in done.stderr.splitlines() if "Downloading artifacts" not in line]
    assert (done.stdout, [line for line in others if line]) == ("", [])
    version = MlflowClient().get_model_version_by_alias("notebook", "champion")
    assert version.version == "1"


def test_a_new_local_store_is_made_in_silence(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server MLflow makes a database in the current folder, and logs that."""
    monkeypatch.delenv("MLFLOW_LOGGING_LEVEL")
    done = python(own, "-c", "import tunix_mlflow as tm\nwith tm.start_run() as run: pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (own / "mlflow.db").is_file()


def test_public_names_load_lazily() -> None:
    """Each name is there; importing the package loads nothing but the version."""
    for name in tm.__all__:
        assert getattr(tm, name) is not None
    code = "import sys, tunix_mlflow; print(sorted(m for m in sys.modules if 'tunix_mlflow.' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tunix_mlflow.version']"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tm.nothing  # noqa: B018


def test_what_needs_another_environment_is_refused(store: str, own: Path) -> None:
    """The variable is named; jax that is loaded already is taken as it is otherwise."""
    config = tm.load_config(None, tiny(dataset="golden-v2", training__fast_math="true"))
    with pytest.raises(tm.errors.ConfigError, match="XLA_FLAGS"):
        tm.train(config)


def test_a_reporter_is_given_everything(
    store: str, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Messages and progress go to the reporter, nothing to the terminal."""

    class Reporter:
        def __init__(self) -> None:
            self.messages: list[str] = []
            self.steps: list[tuple[str, int, int]] = []

        def info(self, message: str) -> None:
            self.messages.append(message)

        def progress(self, task: str, done: int, total: int, figures: object) -> None:
            self.steps.append((task, done, total))

    reporter = Reporter()
    dataset = tm.load_dataset(str(own / "own.jsonl"), key="own-v1")
    before = signal.getsignal(signal.SIGTERM)
    tm.train(tm.load_config(None, tiny(dataset=dataset.key)), reporter=reporter)
    assert ("train", 4, 4) in reporter.steps
    assert any("tunix-mlflow resume" in message for message in reporter.messages)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert signal.getsignal(signal.SIGTERM) is before
    assert mlflow.active_run() is None
