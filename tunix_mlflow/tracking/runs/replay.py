"""Proving a run: train its last segment again, and compare.

From the checkpoint before the last to the last one, every update is done once more. The state
must have the digest that the last checkpoint's manifest names, and each loss its recorded value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import CheckpointError, IntegrityError
from tunix_mlflow.models import arrays
from tunix_mlflow.runtime import devices
from tunix_mlflow.tracking import artifacts
from tunix_mlflow.tracking.record import metrics_log
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, METRICS_LOG
from tunix_mlflow.tracking.runs import lookup, resume
from tunix_mlflow.training import checkpoint, setup, step
from tunix_mlflow.training.step import TrainState

VERDICT_TAG = "tunix_mlflow.verified"
_COMPARED = ("train/loss", "train/grad_norm", "eval/loss")


class ReplayReport(NamedTuple):
    """What a replay found."""

    first: int  # updates done before the segment
    last: int
    points: int  # recorded values that were compared
    differences: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything came out the same."""
        return not self.differences

    def summary(self) -> str:
        """One line, for people and for the run's tag."""
        span = f"steps {self.first + 1} to {self.last} trained again"
        if self.ok:
            return f"ok: {span}, state and {self.points} values the same to the bit"
        more = f" and {len(self.differences) - 1} more" if len(self.differences) > 1 else ""
        return f"differs: {span}; {self.differences[0]}{more}"


def verify(
    client: MlflowClient | None,
    run_id: str,
    config: Config,
    manifest: Manifest,
    report: Callable[[str], None],
) -> ReplayReport:
    """Train the last segment of a run again.

    Args:
        client: reaches MLflow; None: by what is on this machine alone.
        run_id: the run.
        config: its configuration.
        manifest: of its dataset, verified.
        report: receives one-line messages.

    Raises:
        CheckpointError: if there is no checkpoint to compare with, or it is another
            configuration's.
        IntegrityError: if a checkpoint is damaged.
    """
    with artifacts.base(config) as base:
        made = setup.assemble(config, manifest, devices.use(config.device), base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _checkpoints(client, run_id, Path(scratch))
        sealed = checkpoint.steps(folder)
        if not sealed:
            raise CheckpointError(f"run {run_id} has no checkpoint, here or in MLflow")
        target = arrays.check(sealed[-1])
        kept = checkpoint.Checkpoints(
            folder, made.identity(), retention=checkpoint.Retention.of(config.checkpoints)
        )
        try:
            kept.restore(int(target["step"]), made.state)  # made of this very configuration
            first, begin = 0, made.state
            if len(sealed) == 1 and lookup.is_forked(paths.run_dir(run_id), client, run_id):
                raise CheckpointError(f"run {run_id} began as a fork and has one checkpoint only")
            if len(sealed) > 1:
                first = int(sealed[-2].name)
                begin = kept.restore(first, made.state)
        finally:
            kept.close()
    if "state_digest" not in target:
        raise IntegrityError(f"{sealed[-1]} does not say what state it holds")
    last = int(target["step"])
    report(f"run {run_id}: training steps {first + 1} to {last} again")
    recorded = {
        (p.key, p.step): p.value
        for p in _points(client, run_id)
        if p.key in _COMPARED and first < p.step <= last
    }
    values, reached = _again(made, begin, first, last, {s for k, s in recorded if k == "eval/loss"})
    differences = [
        f"{key} at step {at}: recorded {value!r}, now {values.get((key, at))!r}"
        for (key, at), value in sorted(recorded.items())
        if values.get((key, at)) != value
    ]
    digest = arrays.digest(reached)
    if digest != target["state_digest"]:
        differences.insert(0, f"the state is {digest[:16]}, not {target['state_digest'][:16]}")
    return ReplayReport(first, last, len(recorded), differences)


def _again(
    made: setup.Setup, begin: TrainState, first: int, last: int, evaluated: set[int]
) -> tuple[dict[tuple[str, int], float], TrainState]:
    """The values of each step, and the state after the last."""
    at, values = begin, {}
    data = made.train_batches()
    for done in range(first, last):
        at, metrics = step.train_step(at, data.at(done), made.frozen, spec=made.spec)
        values["train/loss", done + 1] = float(metrics.loss)
        values["train/grad_norm", done + 1] = float(metrics.grad_norm)
        if done + 1 in evaluated:
            values["eval/loss", done + 1] = made.held_out_loss(at)["eval/loss"]
    return values, at


def _checkpoints(client: MlflowClient | None, run_id: str, scratch: Path) -> Path:
    """The run's own checkpoints, else copies of the two newest that were uploaded."""
    here = paths.run_dir(run_id) / CHECKPOINTS
    if len(checkpoint.steps(here)) > 1 or client is None:
        return here
    uploaded = resume.uploaded_steps(client, run_id)
    if len(uploaded) <= len(checkpoint.steps(here)):
        return here
    fetched = [
        Path(client.download_artifacts(run_id, uploaded[number], str(scratch)))
        for number in sorted(uploaded)[-2:]
    ]
    return fetched[-1].parent


def _points(client: MlflowClient | None, run_id: str) -> list[metrics_log.Point]:
    """The recorded values: MLflow's, which are what people look at."""
    if client is not None:
        return lookup.history(client, run_id, _COMPARED)
    lines = metrics_log.read(paths.run_dir(run_id) / METRICS_LOG)
    return [point for line in lines for point in metrics_log.points(line)]
