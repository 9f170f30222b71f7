"""The process of a command: signals, quiet libraries, exit codes.

The library uses only `COMPILING` of this.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from tunix_mlflow import files
from tunix_mlflow.errors import Interrupted, TunixMlflowError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime import huge_pages
from tunix_mlflow.runtime.report import printable

COMPILING = "compile"  # name of the thread that compiles ahead
_PARENT_CHECK_SECONDS = 0.5
_DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for the result
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it writes into the user's home, and calls out
    # The worker retries for as long as it takes; MLflow's own retries would hide an outage.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Environment of libraries that read it when they are imported; what the user set stays."""


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str], *, compute: bool) -> NoReturn:
    """Run a command in this process, and exit with its code.

    Args:
        main: of the command.
        argv: its arguments.
        compute: whether it computes, so that :func:`huge_pages.restart` is worth its time.
    """
    if compute:
        huge_pages.restart()
    try:
        code: Any = execute(main, argv)
    except SystemExit as stop:
        code = stop.code
    if isinstance(code, int) and any(t.name == COMPILING for t in threading.enumerate()):
        # Do not wait for XLA in its thread; a signal meanwhile would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def execute(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code.

    0; 2: a user's mistake; 3: refused by a gate or a check; 4: disk, memory, network or a lock is
    not available, or MLflow refused a request, worth a retry; 130 and 143: signals; 1: anything
    else, a defect with its traceback. A run that `mlflow run` created for this process, and that
    nothing took over, gets the message as its tag `tunix_mlflow.error`.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if "MLFLOW_RUN_ID" in os.environ:
        _follow_parent()
    set_defaults()
    sys.unraisablehook = _report_unraisable
    warnings.filterwarnings("ignore", ".*'async_serialize.*was never awaited", RuntimeWarning)
    _resolve_relative_store()
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        return _report(Interrupted(signal.SIGINT))
    except TunixMlflowError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of stdout has closed it; do not complain again when stdout is flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = _classify(error)
        if known is not None:
            return _report(known)
        traceback.print_exc()
        _tag_launched_run(f"{type(error).__name__}: {error}")
        return 1


def _classify(error: Exception) -> TunixMlflowError | None:
    """Return the named error of a failure of the environment or of MLflow, None for a defect."""
    if isinstance(error, OSError) and files.is_of_the_disk(error):
        place = f" at {error.filename}" if error.filename else ""
        return UnavailableError(f"{one_line(error)}{place}; free some space and try again")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
        return UnavailableError(f"out of memory: {one_line(error)}")
    package = type(error).__module__.partition(".")[0]
    if package == "requests":
        return UnavailableError(f"MLflow cannot be reached: {one_line(error)}")
    if package == "mlflow":  # its client's traceback helps nobody
        return UnavailableError(f"MLflow failed: {one_line(error)}")
    return None


def set_defaults() -> None:
    """Quieten libraries that read the environment when they are imported."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
    for name in ("absl", "asyncio"):  # Orbax: hundreds of lines when the disk is full
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Print what no caller can be told, but for the echoes of a failure that one is told.

    When Orbax cannot write a file, it closes its event loop; whatever TensorStore's threads still
    wrote for it then finds the loop closed, hundreds of times; some of it was never begun, which is
    a warning (see :func:`execute`).
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _follow_parent() -> None:
    """End as by SIGTERM when `mlflow run` has ended: it does not forward a signal that ends it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        print("tunix-mlflow: `mlflow run` has ended; stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _resolve_relative_store() -> None:
    """Resolve a relative `sqlite:///mlflow.db` against the folder of `mlflow run`.

    It passes the URI on as it is, and starts this process in the project's folder.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    path = uri.removeprefix("sqlite:///")
    if "MLFLOW_RUN_ID" in os.environ and path != uri and not path.startswith("/"):
        import psutil

        launcher = psutil.Process().parent()
        if launcher is not None:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{launcher.cwd()}/{path}"


def _report(error: TunixMlflowError) -> int:
    message = printable(" ".join(str(error).split()))
    print(f"tunix-mlflow: error: {message}", file=sys.stderr, flush=True)
    _tag_launched_run(message)
    return error.exit_code


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _tag_launched_run(message: str) -> None:
    """Mark the run that `mlflow run` created for this process as failed."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id is None:
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        if "tunix_mlflow.version" in client.get_run(run_id).data.tags:
            return  # a run of ours, which `mlflow run` did not make for this process
        client.set_tag(run_id, "tunix_mlflow.error", message[:5000])
        client.set_terminated(run_id, "FAILED")
    except Exception as error:  # the message is on stderr already
        print(f"tunix-mlflow: run {run_id} was not marked: {error}", file=sys.stderr)
