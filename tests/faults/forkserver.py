"""Starts trainings by forking a process that has imported everything and initialised nothing.

One JSON object a line on stdin: arguments, environment, and perhaps crash_at, the operation on a
file below runs/ before which the child is to die. On stdout `ready`, then the child's pid and its
exit code, a line each. What the children print goes to the file that the first argument names.
"""

from __future__ import annotations

import json
import os
import signal
import sys

_WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def _arm(crash_at: int) -> list[int]:
    """Count operations on files below runs/, and die before one of them."""
    count = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _WATCHED:
            return
        # What rmtree removes is named below a folder that it holds open, not by a path.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not inside and "/runs/" not in str(arguments[0]):
            return
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] == crash_at:
            os._exit(9)

    sys.addaudithook(hook)
    return count


def main() -> None:
    from tunix_mlflow.cli.main import invoke
    from tunix_mlflow.pipelines import train  # noqa: F401
    from tunix_mlflow.runtime import process

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print("ready", flush=True)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(request["environment"])
            count = _arm(request.get("crash_at", 0))
            code = process.execute(invoke, ["train", *request["arguments"]])
            print(f"operations: {count[0]}", flush=True)
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
