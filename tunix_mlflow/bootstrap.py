"""What a process does before jax is imported: arguments, environment, signals, exit code.

XLA reads NPROC and XLA_FLAGS once, when it is loaded, so nothing here may import jax; the
import rule's test holds this.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from tunix_mlflow import config as configs
from tunix_mlflow import huge_pages, state
from tunix_mlflow.config import Config
from tunix_mlflow.errors import ConfigError, Interrupted, TunixError

DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"
FAST_CPU = "--xla_cpu_enable_fast_math=true"
QUICK_CPU = "--xla_backend_optimization_level=1"
"""Of LLVM, which XLA has at 3: a step compiles in 0.85 of the time. It runs no slower, and its bits
were the same with AdamW, Muon, bfloat16, remat, and at the shape of SmolLM2-135M."""
COMPILING = "compile"  # name of the thread that compiles ahead
_LOOK_SECONDS = 0.5
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class Arguments(NamedTuple):
    """A parsed command line."""

    config: str | None  # a file or a preset
    stage: dict[str, str]  # the stage's own arguments
    overrides: dict[str, str]  # dotted key -> text

    def require(self, name: str, what: str) -> str:
        """One of the stage's own arguments.

        Raises:
            ConfigError: if it is missing, saying what to give.
        """
        value = self.stage.get(name)
        if not value:
            raise ConfigError(f"{name} is missing; give {what}")
        return value

    def load(self, default: str | None = None) -> Config:
        """The configuration that they mean; `default` is the preset when none is named."""
        presets = state.project_root() / "projects" / "configs"
        return configs.load(self.config or default, self.overrides, presets)


def parse(
    argv: Sequence[str],
    own: Iterable[str] = (),
    positional: str = "config",
    flags: Iterable[str] = (),
) -> Arguments:
    """Read `[WORD] key=value --key value --key=value`, in any order.

    `mlflow run` hands undeclared parameters on as `--key value`, which is why both forms
    are read.

    Args:
        argv: without the program's name.
        own: names that are the stage's and not the configuration's.
        positional: what a bare word stands for.
        flags: names of the stage's own that may stand alone, as `--name`, for `true`.

    Raises:
        ConfigError: naming the argument that makes no sense.
    """
    alone = {f"--{flag}": flag for flag in flags}
    names = {*own, *flags, "config"}
    values: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if argument in alone and argv[position : position + 1] not in (["true"], ["false"]):
            key, value = alone[argument], "true"
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if not equals:
                if position == len(argv):
                    raise ConfigError(f"--{key} needs a value")
                value = argv[position]
                position += 1
        elif "=" in argument:
            key, _, value = argument.partition("=")
        else:
            key, value = positional, argument
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{argument!r} is not key=value or --key value")
        if key in values and values[key] != value:
            raise ConfigError(f"{key} is given twice: {values[key]!r} and {value!r}")
        values[key] = value
    return Arguments(
        values.get("config") or None,
        {key: value for key, value in values.items() if key in names and key != "config"},
        {key: value for key, value in values.items() if key not in names},
    )


def prepare(config: Config, recorded: Mapping[str, str] | None = None) -> None:
    """Set the environment that XLA reads when it is loaded, and have Python collect less garbage.

    Args:
        config: `device`, `mesh`, `training.deterministic` and `training.fast_math` are read.
        recorded: the environment of the run that is resumed, which wins: bit-identity
            depends on the number of threads.

    Raises:
        ConfigError: if jax was imported already with another environment.
    """
    wanted: dict[str, str] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted["NPROC"] = os.environ.get("NPROC") or str(cores or 1)
    flags = os.environ.get("XLA_FLAGS", "")
    asked = {
        DETERMINISTIC_GPU: config.training.deterministic,
        FAST_CPU: config.training.fast_math,
        # Nobody asked for it: a level that the user names stays, and a jax that is loaded already.
        QUICK_CPU: QUICK_CPU.partition("=")[0] not in flags
        and flags.strip()[:2] in ("", "--")  # else XLA takes it all for the name of a file
        and "jax" not in sys.modules
        and _cpu_alone(config.device),
    }
    for flag, wish in asked.items():
        if wish and flag not in flags:
            flags = f"{flags} {flag}".strip()
    wanted["XLA_FLAGS"] = flags
    before = dict(recorded or {})
    if "XLA_FLAGS" in before and not _cpu_alone(config.device):  # the run may have begun on a CPU
        before["XLA_FLAGS"] = before["XLA_FLAGS"].replace(QUICK_CPU, "").strip()
    wanted.update(before)
    if config.mesh.size > 1:
        wanted["JAX_NUM_CPU_DEVICES"] = str(config.mesh.size)
    if config.device.startswith("cpu"):
        wanted["JAX_PLATFORMS"] = "cpu"  # do not take a GPU's memory for nothing
    elif (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms.split(","):
        wanted["JAX_PLATFORMS"] = f"{platforms},cpu"  # where parameters are drawn
    wanted["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        state.compilation_cache()
    )
    # By default what compiles within a second is compiled again each time.
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    wanted[least] = os.environ.get(least) or "0.05"
    changed = [name for name, value in wanted.items() if os.environ.get(name, "") != value]
    if "jax" in sys.modules and {"NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"} & set(changed):
        raise ConfigError(
            f"jax is loaded already, so {', '.join(changed)} cannot be set any more;"
            " start a new process"
        )
    os.environ.update(wanted)
    # What imports and tracing make stays; to look for garbage in it takes a twentieth of a start.
    gc.set_threshold(100_000, 10, 10)


def _cpu_alone(device: str) -> bool:
    """Whether jax will look for no other device."""
    if device.startswith("cpu") or os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    others = ("jax_plugins", "libtpu")  # packages by which jax finds them
    return device == "auto" and not any(importlib.util.find_spec(name) for name in others)


def _calm() -> None:
    """Defaults for libraries that read them when they are imported."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    quiet["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for the result
    quiet["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    quiet["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it writes into the user's home, and calls out
    # The outbox tries again for as long as it takes; MLflow's own retries would hide an outage.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line a retry
    for name in ("absl", "asyncio"):  # Orbax: hundreds of lines for a disk that is full
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name, value in {**quiet, **patience}.items():
        os.environ.setdefault(name, value)


def run(main: Callable[[Sequence[str]], None], *, computes: bool = True) -> NoReturn:
    """Be a process: :func:`execute`, and end.

    Args:
        main: of the process.
        computes: whether it is worth :func:`huge_pages.restart`.
    """
    if computes:
        huge_pages.restart()
    try:
        code: Any = execute(main, sys.argv[1:])
    except SystemExit as stop:
        code = stop.code
    if isinstance(code, int) and any(t.name == COMPILING for t in threading.enumerate()):
        # What nobody waits for any more would take its time, and a signal meanwhile abort us.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def execute(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a stage and turn what happens into an exit code.

    0; 2 for the user's mistake; 3 for a refusal; 130 and 143 for signals; 1 for anything
    else, with a traceback unless it is MLflow that failed. A run that `mlflow run` made for this
    process and that no session took over gets the message in its tag `tunix.error`.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if "MLFLOW_RUN_ID" in os.environ:
        _follow_parent()
    _calm()
    _anchor_store()
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        return _report(Interrupted(signal.SIGINT))
    except TunixError as error:
        return _report(error)
    except BrokenPipeError:
        # Whoever read has seen enough; do not complain again when stdout is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("mlflow", "requests"):
            # A server that went away; its client's traceback helps nobody.
            return _report(TunixError(f"MLflow failed: {error}"))
        traceback.print_exc()
        _tag_launched(f"{type(error).__name__}: {error}")
        return 1


def _follow_parent() -> None:
    """End as by SIGTERM when `mlflow run` is gone: it hands on no signal that ends it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        print("tunix-mlflow: `mlflow run` is gone; ending too", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _anchor_store() -> None:
    """Read a relative `sqlite:///mlflow.db` as the launcher meant it.

    `mlflow run` hands the address on as it is, and starts us in the project's folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    path = uri.removeprefix("sqlite:///")
    if "MLFLOW_RUN_ID" in os.environ and path != uri and not path.startswith("/"):
        import psutil

        launcher = psutil.Process().parent()
        if launcher is not None:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{launcher.cwd()}/{path}"


def _report(error: TunixError) -> int:
    message = " ".join(str(error).split())
    print(f"tunix-mlflow: error: {message}", file=sys.stderr, flush=True)
    _tag_launched(message)
    return error.exit_code


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _tag_launched(message: str) -> None:
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id is None:
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        client.set_tag(run_id, "tunix.error", message[:5000])
        client.set_terminated(run_id, "FAILED")
    except Exception as error:  # the message is on stderr already
        print(f"tunix-mlflow: run {run_id} was not marked: {error}", file=sys.stderr)
