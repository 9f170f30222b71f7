"""Which run a training continues, and with which configuration. Loads MLflow, not jax."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from tunix_mlflow.config.load import apply_overrides, inherit_auto
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.pipelines import undelivered
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.runs import resume as resuming


class ResumePoint(NamedTuple):
    """Where a training begins, when not at step 0 of a new run."""

    run_id: str
    step: int | None = None  # None: the newest checkpoint
    fork: bool = False  # a new run begins there
    take_over: str | None = None  # why another process's lease on the run is not waited for
    is_recorded: bool = True  # False: its process died before it recorded a configuration
    before: Config | None = None  # its configuration so far; None: not known


class Resumption(NamedTuple):
    """How a run is continued."""

    config: Config
    environment: Mapping[str, str]  # of the run; it must be exported before jax is loaded
    point: ResumePoint | None  # None: there is no such run yet
    finished: bool = False  # there is nothing left to do


@store.restored()
def resume_run(
    run_id: str,
    overrides: Mapping[str, Any],
    *,
    step: int | None = None,
    fork: bool = False,
    take_over: str | None = None,
    reporter: Reporter = SILENT,
) -> Resumption:
    """Return how the training run `run_id` is continued.

    Args:
        run_id: MLflow's, or the name of a local folder that MLflow does not know yet.
        overrides: dotted keys to change; which may change is `config.identity.FREE`.
        step: begin at the checkpoint of this step; None: at the newest.
        fork: begin a new run there; anything may change.
        take_over: why another process's lease on the run is not waited for; None: it is.
        reporter: receives messages.

    A run that has finished and of which MLflow refused a part is completed, and there is nothing
    left to do.

    Raises:
        TrackingError: if there is no such run, it has finished, or a key that may not change does.
        UnavailableError: if MLflow still refuses a part of a run that has finished.
        ConfigError: if an override is wrong.
    """
    if step is not None and step < 0:
        raise ConfigError(f"step: expected a number of updates, got {step}")

    recorded = None

    def change(before: Config) -> Config:
        nonlocal recorded
        recorded = before
        return apply_overrides(before, overrides)

    if not fork and undelivered.is_incomplete(run_id):
        finished = lookup.look_up(run_id, reporter.info)
        if resuming.is_done(finished, change(finished.config)):
            undelivered.complete(finished.client, finished.run_id, reporter.info)
            return _nothing_left(finished)
    run = resuming.to_resume(run_id, reporter.info, change, fork=fork)
    point = ResumePoint(run.run_id, step, fork, take_over, before=recorded)
    return Resumption(run.config, run.environment, point)


@store.restored()
def resume_by_key(config: Config, *, reporter: Reporter = SILENT) -> Resumption:
    """Return how the newest run with `tracking.key` is continued, or begun if there is none.

    Args:
        config: the whole configuration; what is null is as the run resolved it.
        reporter: receives messages.

    Raises:
        ConfigError: without a key.
        TrackingError: if the run was made with another configuration.
    """
    if not config.tracking.key:
        raise ConfigError("resume=auto needs tracking.key=NAME, by which the run is found again")
    run_id = lookup.of_key(config.tracking)
    if run_id is None:
        return Resumption(config, {}, None)
    try:
        run = lookup.look_up(run_id, reporter.info)
    except lookup.NotRecorded:  # killed in its first moments
        return Resumption(config, {}, ResumePoint(run_id, is_recorded=False))
    config = inherit_auto(config, run.config)
    resuming.check_changes(run, config)
    if not resuming.is_done(run, config):
        point = ResumePoint(run.run_id, before=run.config)
        return Resumption(config, run.environment, point)
    launched = os.environ.get("MLFLOW_RUN_ID")
    if launched is not None:
        lookup.tag_launcher(store.connect(config.tracking), launched, run.run_id)
    undelivered.complete(run.client, run.run_id, reporter.info)
    return _nothing_left(run)


def _nothing_left(run: lookup.RecordedRun) -> Resumption:
    return Resumption(run.config, run.environment, ResumePoint(run.run_id), finished=True)
