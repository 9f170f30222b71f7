"""Lines of a metrics log as MLflow's metrics, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from tunix_mlflow.tracking.record import metrics_log
from tunix_mlflow.tracking.record.cursor import Refused
from tunix_mlflow.tracking.record.metrics_log import Point
from tunix_mlflow.tracking.sync.answers import Answer, Undeliverable, understand

BATCH = 1000  # points in one request; MLflow takes no more


class RefusedPoints(NamedTuple):
    """Points of one metric that MLflow refuses."""

    key: str
    answer: Answer
    number: int


def log_points(
    client: MlflowClient,
    run_id: str,
    points: Sequence[Point],
    check: Callable[[Answer], None],
) -> list[RefusedPoints]:
    """Log points, all but those that MLflow refuses.

    Args:
        client: reaches MLflow.
        run_id: the run.
        points: its points.
        check: raises where an answer says something else than that points are refused.

    Returns:
        What it refuses, by key.
    """
    batch = [_metric(point, run_id) for point in points]
    refused: dict[str, RefusedPoints] = {}
    parts = [batch[n : n + BATCH] for n in range(0, len(batch), BATCH)]
    while parts:
        part = parts.pop(0)
        try:
            client.log_batch(run_id, metrics=part)
        except Exception as error:
            answer = understand(error)
            if answer.may_be_split and len(part) > 1:
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            check(answer)
            for metric in part:
                before = refused.get(metric.key)
                number = before.number + 1 if before else 1
                refused[metric.key] = RefusedPoints(metric.key, answer, number)
    return list(refused.values())


def log_again(client: MlflowClient, run_id: str, path: Path, one: Refused) -> None:
    """Log the points of a metric that was refused.

    Raises:
        Undeliverable: if its lines cannot be read.
        Exception: what the client raises.
    """
    with path.open("rb") as handle:
        handle.seek(one.at)
        points, _ = read_points(handle.read())
    again = [point for point in points if point.key == one.what]
    if not again:
        raise Undeliverable(one.why)
    log_batches(client, run_id, again)


def log_batches(client: MlflowClient, run_id: str, points: Sequence[Point]) -> None:
    """Log points, all or none of each request.

    Raises:
        Exception: what the client raises.
    """
    for start in range(0, len(points), BATCH):
        batch = [_metric(point, run_id) for point in points[start : start + BATCH]]
        client.log_batch(run_id, metrics=batch)


def read_points(lines: bytes) -> tuple[list[Point], list[tuple[int, str]]]:
    """Return the points of complete lines, and byte and reason of each line that is damaged."""
    points: list[Point] = []
    damaged: list[tuple[int, str]] = []
    at = 0
    for raw in lines.splitlines(keepends=True):
        try:
            points += metrics_log.points(metrics_log.decode(raw))
        except ValueError as error:
            damaged.append((at, f"damaged: {error}"))
        at += len(raw)
    return points, damaged


def some_lines(path: Path, start: int) -> bytes:
    """Return complete lines that hold about BATCH points."""
    if not path.exists():
        return b""
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read(256_000)
        if data and b"\n" not in data:
            data += handle.readline()
    end, count = 0, 0
    for raw in data.splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        count += max(1, raw.count(b":") - 3)  # step, timestamp, metrics
        if end and count > BATCH:
            break
        end += len(raw)
    return data[:end]


def _metric(point: Point, run_id: str) -> Metric:
    name, digest = point.dataset or (None, None)
    return Metric(
        point.key,
        point.value,
        point.timestamp,
        point.step,
        model_id=point.model_id,
        dataset_name=name,
        dataset_digest=digest,
        run_id=run_id,
    )
