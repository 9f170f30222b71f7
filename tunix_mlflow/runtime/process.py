"""Be a process of ours: signals, quiet libraries, exit codes. The library uses none of this."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from tunix_mlflow.errors import Interrupted, TunixMlflowError
from tunix_mlflow.runtime import huge_pages

COMPILING = "compile"  # name of the thread that compiles ahead
_LOOK_SECONDS = 0.5


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
    process and that no session took over gets the message in its tag `tunix_mlflow.error`.
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
    except TunixMlflowError as error:
        return _report(error)
    except BrokenPipeError:
        # Whoever read has seen enough; do not complain again when stdout is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("mlflow", "requests"):
            # A server that went away; its client's traceback helps nobody.
            return _report(TunixMlflowError(f"MLflow failed: {error}"))
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


def _report(error: TunixMlflowError) -> int:
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
        client.set_tag(run_id, "tunix_mlflow.error", message[:5000])
        client.set_terminated(run_id, "FAILED")
    except Exception as error:  # the message is on stderr already
        print(f"tunix-mlflow: run {run_id} was not marked: {error}", file=sys.stderr)
