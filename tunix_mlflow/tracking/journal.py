"""Metrics go to a file first, and from there to MLflow in batches, in the background.

A line of `metrics.jsonl` is one flushed write: {"step", "timestamp", "metrics"}, or
{"part", "timestamp"} where a process began. MLflow stores a point once for the same key,
step and timestamp, so a journal can be shipped again and nothing doubles: that is how a
resumed run makes sure that everything arrived.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.errors import NotShipped, TrackingError

COMPARED = ("train/", "eval/")
BATCH = 1000
_INTERVAL_SECONDS = 2.0
_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 60.0


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class Journal:
    """A MetricWriter that records and ships.

    Args:
        path: metrics.jsonl; what it holds already is shipped again.
        ship: sends a batch of at most BATCH points; may raise, and is then tried again.
        report: told once when shipping fails, and of lost determinism.
    """

    def __init__(
        self,
        path: Path,
        ship: Callable[[Sequence[Point]], None],
        report: Callable[[str], None],
    ) -> None:
        self.path, self._ship, self._report = path, ship, report
        self._seen: dict[tuple[str, int], float] = {}
        self._queue: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._written = self._shipped = 0  # each has one writing thread
        self.different: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read(path, mend=True):
            for point in _points(line):
                self._seen[point.key, point.step] = point.value
                self._put(point)
        self._file = path.open("a", encoding="utf-8")
        self._append({"part": os.getpid(), "timestamp": _now()})
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    @property
    def unshipped(self) -> int:
        """Points that MLflow did not take yet."""
        return self._written - self._shipped

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line and queue its points.

        A point that an earlier part of this run wrote is not written again; if it is of a
        kind that must repeat exactly and does not, that is reported.
        """
        fresh = {}
        for key, value in scalars.items():
            before = self._seen.get((key, step))
            if before is None:
                fresh[key] = self._seen[key, step] = float(value)
            elif key.startswith(COMPARED) and not _same(before, float(value)):
                self.different.append(f"{key} at step {step}: {before!r}, now {value!r}")
                if len(self.different) == 1:
                    self._report(f"not the same as before the resume: {self.different[0]}")
        if fresh:
            line = {"step": step, "timestamp": _now(), "metrics": fresh}
            self._append(line)
            for point in _points(line):
                self._put(point)

    def flush(self) -> None:
        """Force the file to disk."""
        os.fsync(self._file.fileno())

    def drain(self, seconds: float = _DRAIN_SECONDS) -> bool:
        """Wait until everything written so far is shipped; False if time ran out."""
        self._hurry.set()
        deadline = time.monotonic() + seconds
        while self.unshipped and time.monotonic() < deadline:
            time.sleep(0.02)
        self._hurry.clear()
        return not self.unshipped

    def close(self) -> None:
        """Ship what is left.

        Raises:
            NotShipped: if MLflow did not take it in time; the file has everything.
        """
        self._queue.put(None)
        self._thread.join(_DRAIN_SECONDS)
        self.flush()
        self._file.close()
        if self.unshipped:
            raise NotShipped(
                f"{self.unshipped} metric points did not reach MLflow; they are in {self.path},"
                " and are shipped when the run is opened again"
            )

    def _put(self, point: Point) -> None:
        self._written += 1
        self._queue.put(point)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _run(self) -> None:
        waiting: list[Point] = []
        ended = failed = False
        deadline = math.inf
        while True:
            until = time.monotonic() + _INTERVAL_SECONDS
            while not ended and len(waiting) < BATCH and time.monotonic() < until:
                try:
                    item = self._queue.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    if self._hurry.is_set():
                        break
                    continue
                if item is None:
                    ended = True
                    deadline = time.monotonic() + _DRAIN_SECONDS
                else:
                    waiting.append(item)
            if waiting:
                try:
                    self._ship(waiting[:BATCH])
                except Exception as error:  # whatever the client raises, the points are kept
                    if not failed:
                        self._report(f"MLflow does not take metrics ({error}); trying again")
                    failed = True
                    if time.monotonic() > deadline:
                        return
                    time.sleep(1.0)
                else:
                    failed = False
                    self._shipped += len(waiting[:BATCH])
                    waiting = waiting[BATCH:]
            if ended and not waiting:
                return


def read(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The lines of a journal, without a last one that a kill cut short.

    Args:
        path: the file; an absent one is empty.
        mend: also cut the torn line off the file.

    Raises:
        TrackingError: if another line is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        with path.open("r+b") as handle:
            handle.truncate(len(whole))
    lines = []
    for number, raw in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(raw))
        except ValueError as error:
            raise TrackingError(f"{path}:{number} is damaged; restore the file") from error
    return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The six figures for a table of runs, from the whole journal.

    final_loss and best_loss are training losses; total_tokens counts what is not padding;
    avg_throughput is tokens by the time of the steps alone, without the first step of each
    part, which compiles; wall_time sums, over the parts of a resumed run, the seconds from the
    part's start to its last line.
    """
    losses: dict[int, float] = {}
    tokens: dict[int, float] = {}
    milliseconds: dict[int, float] = {}
    wall, start, last = 0.0, None, 0
    for line in lines:
        if "part" in line:
            wall += (last - start) / 1000 if start is not None else 0.0
            start = last = line["timestamp"]
            continue
        last, step, metrics = line["timestamp"], line["step"], line["metrics"]
        for key, into in (
            ("train/loss", losses),
            ("train/tokens", tokens),
            ("perf/step_time_ms", milliseconds),
        ):
            if key in metrics:
                into[step] = metrics[key]
    wall += (last - start) / 1000 if start is not None else 0.0
    if not losses:
        return {}
    timed = [step for step in milliseconds if step in tokens]
    spent = sum(milliseconds[step] for step in timed)
    return {
        "final_loss": losses[max(losses)],
        "best_loss": min(losses.values()),
        "total_steps": float(max(losses)),
        "total_tokens": sum(tokens.values()),
        "avg_throughput": 1000 * sum(tokens[s] for s in timed) / spent if spent else 0.0,
        "wall_time": wall,
    }


def _points(line: Mapping[str, Any]) -> list[Point]:
    return [
        Point(key, value, line["timestamp"], line["step"])
        for key, value in line.get("metrics", {}).items()
    ]


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _now() -> int:
    return time.time_ns() // 1_000_000
