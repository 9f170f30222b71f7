"""metrics.jsonl: every metric of a run, on the disk first.

A line is one flushed write: {"step", "timestamp", "metrics"}, or {"part", "timestamp"} where a
process began. The file is the record; delivery.py tells MLflow of it. MLflow stores a point once
for the same key, step and timestamp, so lines can be delivered again and nothing doubles.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking.record import event_log

METRICS_LOG = "metrics.jsonl"
COMPARED = ("train/", "eval/")


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class MetricsLog:
    """A MetricWriter that writes metrics.jsonl. Safe to use from several threads.

    Args:
        path: the file; what it holds was written by earlier parts of the run.
        report: told of lost determinism.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path, self._report = path, report
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int], float] = {}
        self.different: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read(path, mend=True):
            for point in points(line):
                self._seen[point.key, point.step] = point.value
        self._file = path.open("a", encoding="utf-8")
        self._append({"part": os.getpid(), "timestamp": _now()})

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one line.

        A point that an earlier part of this run wrote is not written again; if it is of a
        kind that must repeat exactly and does not, that is reported.
        """
        with self._lock:
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
                self._append({"step": step, "timestamp": _now(), "metrics": fresh})

    def next_step(self, prefix: str) -> int:
        """The step after the last one of the metrics that begin so."""
        return 1 + max((step for key, step in self._seen if key.startswith(prefix)), default=-1)

    def flush(self) -> None:
        """Force the file to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the file to disk, and close it."""
        with self._lock:
            self.flush()
            self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The lines of a journal, without a last one that a kill cut short.

    Args:
        path: the file; an absent one is empty.
        mend: also cut the torn line off the file.

    Raises:
        TrackingError: if another line is damaged.
    """
    whole = event_log.whole_lines(path, mend=mend)
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


def merge(path: Path, known: Iterable[Point]) -> int:
    """Make the file agree with MLflow: what both have gets MLflow's timestamp and value.

    What the file alone has stays. So the file can be delivered anew, and nothing doubles.

    Returns:
        How many points the file got, or got otherwise.
    """
    lines = read(path, mend=True)
    theirs = {(point.key, point.step): point for point in known}
    same = set()
    for line in lines:
        for point in points(line):
            other = theirs.get((point.key, point.step))
            if other is None:
                continue
            if other.timestamp == point.timestamp and _same(other.value, point.value):
                same.add((point.key, point.step))
            else:
                del line["metrics"][point.key]
    lines = [line for line in lines if line.get("metrics") or "part" in line]
    missing: dict[tuple[int, int], dict[str, float]] = {}
    for place, point in theirs.items():
        if place not in same:
            missing.setdefault((point.timestamp, point.step), {})[point.key] = point.value
    if missing:
        lines += [
            {"step": step, "timestamp": timestamp, "metrics": metrics}
            for (timestamp, step), metrics in missing.items()
        ]
        lines.sort(key=lambda line: int(line["timestamp"]))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        event_log.write_whole(path, text.encode())
    return sum(len(metrics) for metrics in missing.values())


def points(line: Mapping[str, Any]) -> list[Point]:
    """The points of a line."""
    return [
        Point(key, value, line["timestamp"], line["step"])
        for key, value in line.get("metrics", {}).items()
    ]


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _now() -> int:
    return time.time_ns() // 1_000_000
