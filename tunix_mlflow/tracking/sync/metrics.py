"""Lines of a metrics log as MLflow's metrics, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.files import one_line
from tunix_mlflow.tracking.record.metrics_log import Point
from tunix_mlflow.tracking.sync.refusal import is_refusal

BATCH = 1000  # points in one request; MLflow takes no more


def log_points(client: MlflowClient, run_id: str, points: Sequence[Point]) -> dict[str, str]:
    """Log points, all but those that MLflow will never take.

    Returns:
        Why, by the names of those.

    Raises:
        Exception: what MLflow's client raises while the server is away.
    """
    metrics = [_metric(point, run_id) for point in points]
    refused: dict[str, str] = {}
    for start in range(0, len(metrics), BATCH):
        refused |= _log(client, run_id, metrics[start : start + BATCH])
    return refused


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


def _log(client: MlflowClient, run_id: str, metrics: list[Metric]) -> dict[str, str]:
    """Log metrics; of a batch that is refused, all but those that are the reason.

    Returns:
        The reason, by the names of those.
    """
    try:
        client.log_batch(run_id, metrics=metrics)
    except MlflowException as error:
        if not is_refusal(client, run_id, error):
            raise
        if len(metrics) == 1:
            return {metrics[0].key: one_line(error)}
        half = len(metrics) // 2
        return _log(client, run_id, metrics[:half]) | _log(client, run_id, metrics[half:])
    return {}
