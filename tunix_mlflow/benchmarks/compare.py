"""Whether a benchmark run is slower than another one, with the noise taken into account.

A figure fell when its median is worse by more than the limit and no repeat of the run reaches any
repeat of the baseline: where the repeats overlap, the noise of the machine explains the difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.tags import PREFIX

REPEATS = "repeat/"
"""Prefix of the metrics that hold the single repeats of a benchmark, one per step."""
BASELINE_TAG = f"{PREFIX}baseline"


class Change(NamedTuple):
    """One figure in two runs."""

    name: str
    baseline: float  # medians
    run: float
    drop: float  # 0.1: worse by a tenth; negative: better
    noise: float  # the wider of the two spreads, by its median
    fell: bool


def compare(
    run: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], max_drop: float
) -> list[Change]:
    """Compare the figures that both runs have; return them by name.

    Args:
        run: name -> its repeats. Of names that end with _per_sec more is better, of others less.
        baseline: the same of the other run.
        max_drop: how much worse a median may be; 0.05 is 5 %.

    Raises:
        TrackingError: for a median of 0.
    """
    return [
        _change(name, run[name], baseline[name], max_drop)
        for name in sorted(run)
        if name in baseline
    ]


def repeats(client: MlflowClient, run_id: str) -> dict[str, list[float]]:
    """Return name -> the single repeats that a benchmark run recorded.

    Raises:
        TrackingError: if there is no such run, or it has none.
    """
    try:
        keys = [key for key in client.get_run(run_id).data.metrics if key.startswith(REPEATS)]
        values: dict[str, list[float]] = {}
        for point in lookup.history(client, run_id, keys):
            values.setdefault(point.key.removeprefix(REPEATS), []).append(point.value)
    except MlflowException as error:
        raise store.failure(error, f"there is no run {run_id!r}") from error
    if not values:
        raise TrackingError(
            f"run {run_id} has no repeats to compare; `tunix-mlflow bench suite=train` makes one"
        )
    return values


def resolve(client: MlflowClient, reference: str) -> str:
    """Return the id of a run that is named by its id, or by @NAME: the baseline of that name.

    Raises:
        TrackingError: if no run has that name.
    """
    if not reference.startswith("@"):
        return reference
    name = reference[1:]
    runs = _accepted(client, name)
    if not runs:
        raise TrackingError(
            f"no run is the baseline {name!r}; `tunix-mlflow bench compare RUN --baseline RUN"
            f" --accept {name}` makes one"
        )
    return str(runs[0].info.run_id)


def accept(client: MlflowClient, run_id: str, name: str) -> None:
    """Make a run the baseline of this name, in place of the one before."""
    for old in _accepted(client, name):
        client.delete_tag(old.info.run_id, BASELINE_TAG)
    client.set_tag(run_id, BASELINE_TAG, name)


def _accepted(client: MlflowClient, name: str) -> list[Run]:
    if "'" in name or not name:
        raise TrackingError(f"{name!r} is not a name for a baseline")
    experiments = [e.experiment_id for e in client.search_experiments()]
    condition = f"tags.`{BASELINE_TAG}` = '{name}'"
    return list(client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"]))


def _change(name: str, run: Sequence[float], baseline: Sequence[float], max_drop: float) -> Change:
    now, before = statistics.median(run), statistics.median(baseline)
    if not now or not before:
        raise TrackingError(f"{name} is 0 in one of the runs, which is not a measurement")
    if name.endswith("_per_sec"):
        drop, disjoint = 1 - now / before, max(run) < min(baseline)
    else:
        drop, disjoint = now / before - 1, min(run) > max(baseline)
    noise = max((max(v) - min(v)) / statistics.median(v) for v in (run, baseline))
    return Change(name, before, now, drop, noise, disjoint and drop > max_drop)
