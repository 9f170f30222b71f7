"""Runs commands by forking a process that has imported everything and initialised nothing.

One JSON object a line on stdin: `command`, the words of a command line; `environment`; `log`, the
file for its output; and perhaps `folder`, the current one; `watched`, parts of the paths of files
that matter; and a `fault`: what happens before operation number `at` on such a file, `kill` or
`fail`. On stdout `ready`, then the child's pid and its exit code, a line each. The last line of
the log says how many operations there were.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
from typing import Any

_WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink", "open"}


def _arm(watched: list[str], at: int, fault: str) -> list[int]:
    """Count operations on files, and die before one of them or make it fail."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED:
            return
        # What rmtree removes is named below a folder that it holds open, not by a path.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not inside and not any(part in str(arguments[0]) for part in watched):
            return
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] != at:
            return
        if fault == "kill":
            os._exit(9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)
    return count


def main() -> None:
    from tunix_mlflow.cli.main import invoke
    from tunix_mlflow.pipelines import evaluate, import_model, promote, seed, train  # noqa: F401
    from tunix_mlflow.runtime import process

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(request.get("environment", {}))
            os.chdir(request.get("folder", "."))
            watched = request.get("watched", ["/runs/"])
            count = _arm(watched, request.get("at", 0), request.get("fault", "kill"))
            try:
                code = process.execute(invoke, request["command"])
            except SystemExit as stop:
                code = int(stop.code or 0)
            print(f"operations: {count[0]}", flush=True)
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
