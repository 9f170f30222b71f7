"""metrics.jsonl: every metric of a run, on the disk before it goes to MLflow.

A line is one flushed write: {"step", "timestamp", "metrics"}, perhaps with "model_id" and
"dataset", or {"part", "timestamp"} where a process began. sync/delivery.py uploads the lines.
MLflow stores a point once for the same key, step, timestamp and value, so lines can be delivered
again.
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

from tunix_mlflow import files
from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking.record import event_log

COMPARED = ("train/", "validation/", "eval/")
"""Metrics that a resumed run must repeat exactly."""
RECORDED_ONCE = (*COMPARED, "train_perf/", "perf/", "system/")
"""Metrics that have one value at a step: a resumed run does not write them again."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int
    model_id: str | None = None
    dataset: tuple[str, str] | None = None  # name and digest


_Place = tuple[str, int, str | None, tuple[str, str] | None]  # key, step, model, dataset


class MetricsLog:
    """Writes metrics.jsonl. Safe to use from several threads.

    Args:
        path: the file; what it holds was written by earlier parts of the run.
        report: called when a resumed run does not repeat what was recorded.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path, self._report = path, report
        self._lock = threading.Lock()
        self._before: dict[_Place, float] = {}  # of earlier parts
        self._differs = False
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read(path, truncate=True):
            for point in points(line):
                self._before[point.key, point.step, point.model_id, point.dataset] = point.value
        self._file = path.open("a", encoding="utf-8")
        self._append({"part": os.getpid(), "timestamp": now()})

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int,
        timestamp: int | None = None,
        model_id: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Append one line.

        A point that an earlier part of this run wrote is not written again. If it has another
        value now: one of :data:`COMPARED` is reported, one of :data:`RECORDED_ONCE` keeps its
        first value, and any other is written, as MLflow would.

        Args:
            metrics: key -> value.
            step: of all of them.
            timestamp: milliseconds since 1970; None: now.
            model_id: a logged model that the values belong to.
            dataset: MLflow's name and digest of the dataset that they were measured on.
        """
        with self._lock:
            new = metrics
            if self._before:
                new = {
                    k: v
                    for k, v in metrics.items()
                    if self._is_new((k, step, model_id, dataset), v)
                }
            if new:
                line: dict[str, Any] = {
                    "step": step,
                    "timestamp": now() if timestamp is None else timestamp,
                    "metrics": dict(new),
                }
                if model_id is not None:
                    line["model_id"] = model_id
                if dataset is not None:
                    line["dataset"] = list(dataset)
                self._append(line)

    def next_step(self, prefix: str) -> int:
        """Return the step after the last one that earlier parts wrote with this prefix."""
        steps = (step for key, step, *_ in self._before if key.startswith(prefix))
        return 1 + max(steps, default=-1)

    def flush(self) -> None:
        """Force the file to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the file to disk, and close it."""
        with self._lock:
            if not self._file.closed:
                self.flush()
                self._file.close()

    def _is_new(self, place: _Place, value: float) -> bool:
        before = self._before.get(place)
        key, step, *_ = place
        if before is None:
            return True
        if _same(before, value):
            return False
        if key.startswith(COMPARED) and not self._differs:
            self._differs = True
            self._report(
                f"not the same as before the resume: {key} at step {step}: {before!r}, now"
                f" {value!r}; the first value is kept"
            )
        return not key.startswith(RECORDED_ONCE)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read(path: Path, *, truncate: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a metrics log, without a last one that a kill cut short.

    Args:
        path: the file; an absent one is empty.
        truncate: also cut the incomplete line off the file.

    Raises:
        TrackingError: if another line is damaged.
    """
    complete = event_log.complete_lines(path, truncate=truncate)
    lines = []
    for number, raw in enumerate(complete.splitlines(), start=1):
        try:
            lines.append(decode(raw))
        except ValueError as error:
            raise TrackingError(
                f"{path}:{number} is damaged; run tunix-mlflow runs repair {path.parent.name}"
            ) from error
    return lines


def decode(line: bytes) -> dict[str, Any]:
    """Return a line of a metrics log.

    Raises:
        ValueError: if it is damaged.
    """
    found = json.loads(line)
    if not isinstance(found, dict) or not ("metrics" in found or "part" in found):
        raise ValueError("it has no metrics")
    try:
        points(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks {error}") from error
    return found


def points(line: Mapping[str, Any]) -> list[Point]:
    """Return the points of a line."""
    dataset = tuple(line["dataset"]) if "dataset" in line else None
    return [
        Point(key, value, line["timestamp"], line["step"], line.get("model_id"), dataset)
        for key, value in line.get("metrics", {}).items()
    ]


def last(path: Path, key: str) -> Point | None:
    """Return the point of a metric that was written last; None if there is none."""
    found = None
    for line in read(path):
        if key in line.get("metrics", {}):
            found = next(point for point in points(line) if point.key == key)
    return found


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of a training for a table of runs.

    final_loss and best_loss are training losses, best_eval_loss and best_eval_loss_step the least
    validation/loss and its step, where there is one. total_tokens counts what is not padding.
    avg_throughput is tokens by the time of the steps alone, without the first step of each part,
    which compiles. wall_time sums, over the parts of a resumed run, the seconds from the part's
    start to its last line.

    Args:
        lines: the whole metrics log.

    Returns:
        The figures; empty without a training loss.
    """
    series: dict[str, dict[int, float]] = {
        key: {}
        for key in ("train/loss", "validation/loss", "train/tokens", "train_perf/step_time_ms")
    }
    wall, start, latest = 0.0, None, 0
    for line in lines:
        if "part" in line:
            wall += (latest - start) / 1000 if start is not None else 0.0
            start = latest = line["timestamp"]
            continue
        latest = line["timestamp"]
        for key, values in series.items():
            if key in line["metrics"]:
                values[line["step"]] = line["metrics"][key]
    wall += (latest - start) / 1000 if start is not None else 0.0
    losses, held_out, tokens, milliseconds = series.values()
    if not losses:
        return {}
    timed = [step for step in milliseconds if step in tokens]
    spent = sum(milliseconds[step] for step in timed)
    figures = {
        "final_loss": losses[max(losses)],
        "best_loss": min(losses.values()),
        "total_steps": float(max(losses)),
        "total_tokens": sum(tokens.values()),
        "avg_throughput": 1000 * sum(tokens[s] for s in timed) / spent if spent else 0.0,
        "wall_time": wall,
    }
    if held_out:
        best = min(held_out, key=lambda step: (held_out[step], step))
        figures |= {"best_eval_loss": held_out[best], "best_eval_loss_step": float(best)}
    return figures


def merge(path: Path, theirs: Iterable[Point]) -> int:
    """Add the points that MLflow has and the file has not.

    Where both have a value at a step, the file's gets MLflow's timestamp, so that the file can be
    delivered again and nothing is there twice. Where they differ in a metric that has one value at
    a step (:data:`RECORDED_ONCE`), MLflow's counts. What the file alone has stays.

    Returns:
        How many points the file got, or got with another timestamp.
    """
    lines = read(path, truncate=True)
    there: dict[tuple[str, int], list[Point]] = {}
    for point in theirs:
        there.setdefault((point.key, point.step), []).append(point)
    same: set[tuple[str, int, int, str]] = set()
    for line in lines:
        for point in points(line):
            others = there.get((point.key, point.step), [])
            if any(o.timestamp == point.timestamp and _same(o.value, point.value) for o in others):
                same.add((point.key, point.step, point.timestamp, repr(float(point.value))))
            elif any(_same(o.value, point.value) for o in others) or (
                others and point.key.startswith(RECORDED_ONCE)
            ):
                del line["metrics"][point.key]
    lines = [line for line in lines if line.get("metrics") or "part" in line]
    missing: dict[tuple[int, int], list[dict[str, float]]] = {}
    count = 0
    for (key, step), others in there.items():
        for point in others:
            if (key, step, point.timestamp, repr(float(point.value))) in same:
                continue
            count += 1
            groups = missing.setdefault((point.timestamp, step), [])
            group = next((one for one in groups if key not in one), None)
            if group is None:  # two values of one metric in the same millisecond
                groups.append(group := {})
            group[key] = point.value
    if missing:
        lines += [
            {"step": step, "timestamp": timestamp, "metrics": metrics}
            for (timestamp, step), groups in missing.items()
            for metrics in groups
        ]
        lines.sort(key=lambda line: int(line["timestamp"]))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text.encode())
    return count


def now() -> int:
    """Return milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
