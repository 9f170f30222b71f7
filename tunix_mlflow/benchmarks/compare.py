"""Whether a benchmark run is slower than another one, with the noise taken into account.

A figure fell when its median is worse by more than what is allowed and no repeat of the run
reaches any of the baseline's: where the repeats overlap, the machine's noise explains it as well.
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

REPEATS = "repeat/"
"""Prefix of the metrics that hold a benchmark's single repeats, one a step."""
BASELINE_TAG = "tunix_mlflow.baseline"


class Change(NamedTuple):
    """One figure of two runs."""

    name: str
    baseline: float  # medians
    run: float
    drop: float  # 0.1: worse by a tenth; negative: better
    noise: float  # the wider of the two spreads, by its median
    fell: bool


def compare(
    run: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], max_drop: float
) -> list[Change]:
    """The figures that both have, by name.

    Args:
        run: name -> its repeats. More is better of what ends with _per_sec, less of all else.
        baseline: the same of the run to measure it by.
        max_drop: by how much a median may be worse, 0.05 is 5 %.

    Raises:
        TrackingError: for a median of 0.
    """
    return [
        _change(name, run[name], baseline[name], max_drop)
        for name in sorted(run)
        if name in baseline
    ]


def repeats(client: MlflowClient, run_id: str) -> dict[str, list[float]]:
    """Name -> the single repeats that a benchmark run recorded.

    Raises:
        TrackingError: if there is no such run, or it has none.
    """
    try:
        keys = [key for key in client.get_run(run_id).data.metrics if key.startswith(REPEATS)]
        found: dict[str, list[float]] = {}
        for point in lookup.history(client, run_id, keys):
            found.setdefault(point.key.removeprefix(REPEATS), []).append(point.value)
    except MlflowException as error:
        raise TrackingError(f"there is no run {run_id!r}: {store.one_line(error)}") from error
    if not found:
        raise TrackingError(
            f"run {run_id} has no repeats to compare; `tunix-mlflow bench suite=train` makes one"
        )
    return found


def resolve(client: MlflowClient, reference: str) -> str:
    """A run's id from itself, or from @NAME: the newest run that was accepted as that baseline.

    Raises:
        TrackingError: if no run has that name.
    """
    if not reference.startswith("@"):
        return reference
    name = reference[1:]
    found = _accepted(client, name)
    if not found:
        raise TrackingError(
            f"no run is the baseline {name!r}; `tunix-mlflow bench compare RUN --baseline RUN"
            f" --accept {name}` makes one"
        )
    return str(found[0].info.run_id)


def accept(client: MlflowClient, run_id: str, name: str) -> None:
    """Make a run the baseline of this name; the one before is it no more."""
    for old in _accepted(client, name):
        client.delete_tag(old.info.run_id, BASELINE_TAG)
    client.set_tag(run_id, BASELINE_TAG, name)


def _accepted(client: MlflowClient, name: str) -> list[Run]:
    if "'" in name or not name:
        raise TrackingError(f"{name!r} is no name for a baseline")
    experiments = [e.experiment_id for e in client.search_experiments()]
    where = f"tags.`{BASELINE_TAG}` = '{name}'"
    return list(client.search_runs(experiments, where, order_by=["attributes.start_time DESC"]))


def _change(name: str, run: Sequence[float], baseline: Sequence[float], max_drop: float) -> Change:
    now, before = statistics.median(run), statistics.median(baseline)
    if not now or not before:
        raise TrackingError(f"{name} is 0 in one of the runs: that is no measurement")
    if name.endswith("_per_sec"):
        drop, apart = 1 - now / before, max(run) < min(baseline)
    else:
        drop, apart = now / before - 1, min(run) > max(baseline)
    noise = max((max(v) - min(v)) / statistics.median(v) for v in (run, baseline))
    return Change(name, before, now, drop, noise, apart and drop > max_drop)
