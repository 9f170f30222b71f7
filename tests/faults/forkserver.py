"""Starts trainings by forking a process that has imported everything and initialised nothing.

One JSON list of arguments a line on stdin; the child's pid on stdout. Standard error of the
children goes to the file that the first argument names.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    from projects import train
    from tunix_mlflow import bootstrap
    from tunix_mlflow.data import datasets  # noqa: F401
    from tunix_mlflow.tracking import session  # noqa: F401
    from tunix_mlflow.training import loop, setup  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(request["environment"])
            code = bootstrap.execute(train.main, request["arguments"])
            sys.stdout.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
