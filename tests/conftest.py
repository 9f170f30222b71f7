"""Real parts for every test: a state root, a tracking store, a server, processes."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

if TYPE_CHECKING:
    from tests.servers import Server

os.environ.setdefault("NPROC", "2")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Or each server starts eight more processes, for jobs that no test has: 20 seconds of a core.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
# One compilation cache for this process and all its children, pytest's workers among them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="tunix-jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# As the command line does: collecting garbage is a twentieth of the time.
gc.set_threshold(100_000, 10, 10)

KEPT = {
    "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
}
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

# One small decoder for all: a second to compile, a few milliseconds a step.
TINY = {
    "model.layers": "1",
    "model.width": "16",
    "model.heads": "2",
    "model.kv_heads": "1",
    "model.mlp_width": "32",
    "training.steps": "4",
    "training.batch_size": "4",
    "training.eval_every_steps": "2",
    "training.save_every_steps": "2",
    "evaluation.samples": "2",
    "evaluation.max_new_tokens": "4",
    "tracking.system_metrics": "false",
}


LONG = (
    *("test_kills.py", "test_mlproject.py", "test_outages.py", "test_public_api.py"),
    *("test_server.py", "test_retention.py", "test_resume.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: (*LONG, item.path.name).index(item.path.name))


T = TypeVar("T")


class BeginFrom(Protocol):
    """The fixture `begin_from`."""

    def __call__(self, name: str, make: Callable[[], T]) -> T: ...


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state root of its own for every test, and an empty current folder."""
    for name in [n for n in os.environ if n.startswith("MLFLOW_") and n not in KEPT]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Leave out LLVM's expensive passes in this process, for modules that mostly compile.

    XLA's own passes are the same: so are the program and the sizes of its buffers. Rounding may
    differ, so no other module sees what was compiled here.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database, made once for all workers: the migrations take seconds."""
    from mlflow.tracking import MlflowClient

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty-store"
    folder.mkdir(exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            with contextlib.chdir(folder):  # where its default experiment keeps artifacts
                MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
            done.touch()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    """A plain MLflow server, for tests that do not mind the runs of others."""
    from tests.servers import mlflow_server

    with mlflow_server(tmp_path_factory.mktemp("server"), empty_database) as it:
        yield it


@pytest.fixture
def store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh SQLite tracking store that this process and its children use."""
    import mlflow

    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_database, path)
    uri = f"sqlite:///{path}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield uri
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def beginnings() -> dict[str, tuple[Path, Any]]:
    """What `begin_from` has made, by name: a folder, and what its maker returned."""
    return {}


@pytest.fixture
def begin_from(
    store: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    beginnings: dict[str, tuple[Path, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> BeginFrom:
    """Begin a test with a tracking store and a state root that a function has filled.

    The first test of a worker that asks for a name calls the function; those that follow get a
    copy of what it left, at the same place, since stores hold absolute paths.
    """
    import mlflow

    def begin(name: str, make: Callable[[], T]) -> T:
        if name not in beginnings:
            folder = tmp_path_factory.mktemp(name)
            (folder / "live").mkdir()
            shutil.copy(store.removeprefix("sqlite:///"), folder / "live" / "mlflow.db")
            use(folder / "live" / "mlflow.db")
            made = make()
            shutil.copytree(folder / "live", folder / "kept", symlinks=True)
            beginnings[name] = folder, made
        folder, made = beginnings[name]
        shutil.rmtree(folder / "live")
        shutil.copytree(folder / "kept", folder / "live", symlinks=True)
        database = folder / "live" / f"{tmp_path.name}.db"  # MLflow keeps connections by path
        (folder / "live" / "mlflow.db").rename(database)
        use(database)
        result: T = made
        return result

    def use(database: Path) -> None:
        uri = f"sqlite:///{database}"
        monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(database.parent / "home"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)

    return begin


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of the environment, by name, in the test's empty folder."""

    def run(
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            cwd=cwd or tmp_path / "cwd",
            env=environment(env),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def run_here(*arguments: str) -> int:
    """The exit code of our command line, in this process."""
    from tunix_mlflow.cli import main as command_line
    from tunix_mlflow.runtime import process

    hook = sys.unraisablehook
    try:
        return process.execute(command_line.invoke, arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def signalled(monkeypatch: pytest.MonkeyPatch, number: int, at: int) -> Iterator[None]:
    """This process gets a signal when a training begins its step `at`, counted from here."""
    from tunix_mlflow.input.batches import Batch
    from tunix_mlflow.training.step import StepMetrics
    from tunix_mlflow.training.trainer import Trainer

    real, calls = Trainer.step, 0

    def step(self: Trainer, batch: Batch) -> StepMetrics:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        yield


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **(extra or {})}


def tiny(**more: str) -> dict[str, str]:
    """The tiny configuration as overrides."""
    return {**TINY, **{key.replace("__", "."): value for key, value in more.items()}}


def as_arguments(overrides: Mapping[str, str]) -> list[str]:
    """Return `key=value` arguments for our command line."""
    return [f"{key}={value}" for key, value in overrides.items()]


def as_parameters(overrides: Mapping[str, str]) -> list[str]:
    """Return `-P key=value` arguments for `mlflow run`."""
    return [word for key, value in overrides.items() for word in ("-P", f"{key}={value}")]


def last_json(output: str) -> dict[str, Any]:
    """The JSON on the last line of a stage's stdout."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def write_traces(path: Path, count: int, *, start: int = 0, split: str | None = None) -> Path:
    """A JSONL file of small distinct traces."""
    with path.open("w", encoding="utf-8") as out:
        for n in range(start, start + count):
            line: dict[str, Any] = {
                "prompt": f"Double {n}",
                "steps": [{"type": "calculation", "content": f"{n}+{n}"}],
                "answer": str(2 * n),
                "meta": {"parity": "even" if n % 2 == 0 else "odd", "n": n},
            }
            if split:
                line["split"] = split
            out.write(json.dumps(line) + "\n")
    return path
