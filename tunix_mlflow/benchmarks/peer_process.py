"""One trainer in a process of its own, which trains in turns with others and is timed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow import paths
from tunix_mlflow.errors import BenchmarkError
from tunix_mlflow.runtime import huge_pages

_PACKAGE = "tunix_mlflow.benchmarks.trainers"


class Peer(NamedTuple):
    """One trainer, ours or another, on one kind of rows."""

    name: str
    rows: str  # full, or mix
    module: str  # of benchmarks.trainers
    arguments: tuple[str, ...] = ()
    fast: bool = False  # ours, with the preset cpu-fast

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's trainer."""
        return self.module == "ours"

    @property
    def key(self) -> str:
        """The name for metrics."""
        name = self.name.lower().replace(", ", "-").replace(" ", "-")
        return f"{self.rows}/{name}"


class PeerResult(NamedTuple):
    """What one trainer did."""

    peer: Peer
    first_step_seconds: float  # from the start of its process
    useful_per_sec: list[float]  # tokens a second that are not padding, one value a repeat
    step_seconds: list[float]
    peak_mb: float  # resident memory of its process
    losses: list[float]  # nats per token, one value an update

    def figures(self) -> dict[str, float]:
        """Return the figures by name; medians of repeats."""
        values = {
            "useful_tokens_per_sec": statistics.median(self.useful_per_sec),
            "step_seconds": statistics.median(self.step_seconds),
            "first_step_seconds": self.first_step_seconds,
            "peak_mb": self.peak_mb,
            "last_loss": self.losses[-1],
        }
        return {f"{self.peer.key}/{name}": value for name, value in values.items()}


class PeerProcess:
    """A trainer's process; the constructor returns when it has paused for the first time.

    Args:
        peer: which trainer.
        folder: with its task, and our configurations.
        python: the interpreter of the peers' environment.
        cache: the folder of our compilation cache; None: one that no other process uses.

    Attributes:
        first_step_seconds: from the start of the process until its first pause.
        compile_seconds: of those, and of the turns since; ours only.

    Raises:
        BenchmarkError: if the process ends, with the last line of its output.
    """

    def __init__(self, peer: Peer, folder: Path, python: Path, cache: Path | None = None) -> None:
        name = f"{peer.rows}-{peer.module}-{'-'.join(peer.arguments)}{peer.fast}"
        self.peer, self._log = peer, folder / f"{name}.log"
        command = [sys.executable if peer.is_ours else str(python), "-m"]
        command += [f"{_PACKAGE}.{peer.module}", str(folder / peer.rows)]
        if peer.is_ours:
            command.append(str(folder / ("fast.json" if peer.fast else "plain.json")))
        self._start = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *peer.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_variables(peer, cache or folder / name),
                text=True,
            )
        try:
            pause = self._read()
        except BaseException:  # a signal too: nobody else knows of the process yet
            self.stop()
            raise
        self._step, self.compile_seconds = int(pause["step"]), float(pause["compile_seconds"])
        self.first_step_seconds = self.seconds_since_start()
        self._peak_mb = 0.0
        self._rates: list[float] = []
        self._step_seconds: list[float] = []

    def seconds_since_start(self) -> float:
        """Return the seconds since the process was started."""
        return time.perf_counter() - self._start

    def turn(self) -> tuple[float, float, int]:
        """Let it train until its next pause; return seconds, useful tokens and updates."""
        self._resume()
        pause = self._read()
        self._peak_mb = pause["peak_mb"]
        self.compile_seconds += pause["compile_seconds"]
        updates, self._step = pause["step"] - self._step, int(pause["step"])
        return pause["seconds"], pause["useful_tokens"], int(updates)

    def timed_turn(self) -> None:
        """Time a turn, after a short one that does not count.

        A trainer does not pause, so the cost of a pause is not its own: Linux meanwhile gives
        memory that a step has freed to others, or back to a virtual machine's host.
        """
        self.turn()
        seconds, useful, updates = self.turn()
        self._rates.append(useful / seconds)
        self._step_seconds.append(seconds / updates)

    def finish(self) -> PeerResult:
        """Let it train to its end, and return what it did."""
        self._resume()
        losses = self._read()["losses"]
        return PeerResult(
            self.peer,
            self.first_step_seconds,
            self._rates,
            self._step_seconds,
            self._peak_mb,
            losses,
        )

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _resume(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._error()
        message: dict[str, Any] = json.loads(line)
        return message

    def _error(self) -> BenchmarkError:
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        code = self._process.wait()
        return BenchmarkError(f"{self.peer.name} failed, exit code {code}: {''.join(last)}")


def inherited_environment() -> dict[str, str]:
    """Return this process's environment as it was before its restart with huge pages."""
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    kept = ":".join(each for each in tunables if each != f"{huge_pages.TUNABLE}=1")
    others = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return others | {"GLIBC_TUNABLES": kept} if kept else others


def _variables(peer: Peer, cache: Path) -> dict[str, str]:
    ours_only = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    variables = inherited_environment()
    if peer.is_ours:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    else:
        variables = {k: v for k, v in variables.items() if k not in ours_only}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TF": "0"}
    return {**variables, **quiet, "PYTHONPATH": str(paths.project_root())}
