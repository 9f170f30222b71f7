"""Commands of ours in forked processes, which can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT, environment


class Commands:
    """Runs one command at a time; importing everything is done once."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forkserver"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def run(
        self,
        words: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        *,
        folder: Path = ROOT,
        watched: Sequence[str] = ("/runs/",),
        at: int = 0,
        fault: str = "kill",
        started: Callable[[int], None] = lambda pid: None,
    ) -> int:
        """Return the exit code of a command.

        Args:
            words: the command line.
            variables: more of its environment.
            log: its output is appended.
            folder: the current one.
            watched: parts of the paths of files that matter.
            at: the operation on such a file before which `fault` happens; 0: none.
            fault: `kill`, or `fail`: the operation finds the disk full.
            started: called with the process id.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {
            **{"command": list(words), "environment": dict(variables), "log": str(log)},
            **{"folder": str(folder), "watched": list(watched), "at": at, "fault": fault},
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        started(int(self._server.stdout.readline()))
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the process that forks."""
        self._server.kill()
        self._server.communicate()


def kill(pid: int) -> None:
    """Kill a process; one that has ended is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
