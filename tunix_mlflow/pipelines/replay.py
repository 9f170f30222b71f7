"""Verify a run: train its last segment again, and compare.

From the checkpoint before the last to the last one, every update is recomputed. The state must
have the digest that the last checkpoint's manifest names, and each loss its recorded value.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import CheckpointError
from tunix_mlflow.input.batches import eval_batches
from tunix_mlflow.models import arrays
from tunix_mlflow.runtime import devices
from tunix_mlflow.tracking import artifacts
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record import metrics_log
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, METRICS_LOG
from tunix_mlflow.tracking.runs import lookup, resume
from tunix_mlflow.training.checkpoint import Checkpoints, Retention, sealed_checkpoints
from tunix_mlflow.training.inputs import TrainingInputs, read_inputs
from tunix_mlflow.training.trainer import Trainer

VERDICT_TAG = "tunix_mlflow.verified"
_COMPARED = ("train/loss", "train/grad_norm", "validation/loss")


class ReplayReport(NamedTuple):
    """What a replay showed."""

    first: int  # updates done before the segment
    last: int
    points: int  # recorded values that were compared
    differences: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything is the same."""
        return not self.differences

    def summary(self) -> str:
        """Return one line, for people and for the run's tag."""
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
    """Train the last segment of a run again, and compare.

    Args:
        client: reaches MLflow; None: use what is on this machine alone.
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
        inputs = read_inputs(config, manifest, devices.use(config.device, config.mesh.size), base)
        trainer = Trainer.create(inputs.config, inputs.vocab_size, inputs.device, base)
    with files.scratch(paths.temporary_dir()) as scratch:
        folder = _checkpoints(client, run_id, scratch)
        sealed = sealed_checkpoints(folder)
        if not sealed:
            raise CheckpointError(f"run {run_id} has no checkpoint, here or in MLflow")
        target = arrays.check(sealed[-1])
        last = int(target["step"])
        identity = inputs.identity(trainer.base_digest)
        checkpoints = Checkpoints(folder, identity, retention=Retention.of(config.checkpoints))
        try:
            checkpoints.restore(last, trainer.state)  # fails if it is another configuration's
            if len(sealed) > 1:
                trainer.state = checkpoints.restore(int(sealed[-2].name), trainer.state)
            elif lookup.is_forked(paths.run_dir(run_id), client, run_id):
                raise CheckpointError(f"run {run_id} began as a fork and has one checkpoint only")
        finally:
            checkpoints.close()
    first = trainer.updates
    report(f"run {run_id}: training steps {first + 1} to {last} again")
    recorded = {
        (p.key, p.step): p.value
        for p in _points(client, run_id)
        if p.key in _COMPARED and first < p.step <= last
    }
    values = _train_again(trainer, inputs, last, {s for k, s in recorded if k == "validation/loss"})
    differences = [
        f"{key} at step {step}: recorded {value!r}, now {values.get((key, step))!r}"
        for (key, step), value in sorted(recorded.items())
        if values.get((key, step)) != value
    ]
    digest = arrays.digest(trainer.state)
    if digest != target["state_digest"]:
        differences.insert(0, f"the state is {digest[:16]}, not {target['state_digest'][:16]}")
    return ReplayReport(first, last, len(recorded), differences)


def _train_again(
    trainer: Trainer, inputs: TrainingInputs, last: int, evaluated: set[int]
) -> dict[tuple[str, int], float]:
    """Train to step `last`; return the values of each step."""
    values: dict[tuple[str, int], float] = {}
    stream, batch_size = inputs.train_batches(), inputs.config.training.batch_size
    for index in range(trainer.updates, last):
        metrics = trainer.step(stream.at(index))
        values["train/loss", index + 1] = float(metrics.loss)
        values["train/grad_norm", index + 1] = float(metrics.grad_norm)
        if index + 1 in evaluated and inputs.validation is not None:
            loss = trainer.evaluate(eval_batches(inputs.validation, batch_size))["validation/loss"]
            values["validation/loss", index + 1] = loss
    return values


def _checkpoints(client: MlflowClient | None, run_id: str, scratch: Path) -> Path:
    """The run's own checkpoints, else copies of the two newest that were uploaded."""
    here = paths.run_dir(run_id) / CHECKPOINTS
    if len(sealed_checkpoints(here)) > 1 or client is None:
        return here
    uploaded = resume.uploaded_steps(client, run_id)
    if len(uploaded) <= len(sealed_checkpoints(here)):
        return here
    fetched = [
        download_artifact(client, run_id, uploaded[number], scratch)
        for number in sorted(uploaded)[-2:]
    ]
    return fetched[-1].parent


def _points(client: MlflowClient | None, run_id: str) -> list[metrics_log.Point]:
    """The recorded values: MLflow's, which are what people look at."""
    if client is not None:
        return lookup.history(client, run_id, _COMPARED)
    lines = metrics_log.read(paths.run_dir(run_id) / METRICS_LOG)
    return [point for line in lines for point in metrics_log.points(line)]
