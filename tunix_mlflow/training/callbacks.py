"""What happens around the updates of a training, in this order.

Log, evaluate, save, stop, profile; `loop.fit` says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax

from tunix_mlflow.config.schema import TrainingConfig
from tunix_mlflow.errors import Interrupted
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.runtime.signals import StopRequest
from tunix_mlflow.training.checkpoint import Checkpoints
from tunix_mlflow.training.loop import Callback, Loop
from tunix_mlflow.training.writers import MetricWriter

_PROFILE_AFTER = 2
"""Updates before a profile begins: the first one compiles."""


class Log(Callback):
    """Write metrics; local writers only, since the loop waits for them."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = writers

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand them on."""
        for writer in self._writers:
            writer.log_metrics(metrics, step)

    def on_flush(self) -> None:
        """Make them durable."""
        for writer in self._writers:
            writer.flush()


class Evaluate(Callback):
    """Compute the validation loss every so many updates, and after the last.

    Args:
        batches: makes the evaluation batches, anew each time.
        every: updates between two evaluations; 0: never.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], every: int) -> None:
        self._batches, self._every = batches, every

    def after_step(self, loop: Loop) -> None:
        """Evaluate if it is due."""
        if loop.is_due(self._every):
            loop.flush_pending()
            loop.eval_metrics = loop.trainer.evaluate(self._batches())
            loop.record(loop.step, loop.eval_metrics)
            loop.restart_clock()


class Save(Callback):
    """Save a checkpoint every so many updates or minutes, and after the last update."""

    def __init__(self, checkpoints: Checkpoints, config: TrainingConfig) -> None:
        self._checkpoints, self._every = checkpoints, config.save_every_steps
        self._seconds = 60 * (config.save_every_minutes or math.inf)
        self._saved = time.monotonic()

    def on_start(self, loop: Loop) -> None:
        """Count the minutes from here."""
        self._saved = time.monotonic()

    def after_step(self, loop: Loop) -> None:
        """Save if it is due."""
        late = time.monotonic() - self._saved > self._seconds
        if loop.is_last or late or loop.is_due(self._every):
            self.save(loop)

    def save(self, loop: Loop) -> None:
        """Start to save this state; one that is saved already stays.

        Raises:
            TrainingStopped: if a parameter is not finite.
        """
        loop.flush_pending()
        if not loop.trainer.is_finite():
            loop.stop(f"step {loop.step}: a parameter is not finite")
        loop.flush()
        self._checkpoints.save(loop.step, loop.trainer.state, loop.eval_metrics)
        self._saved = time.monotonic()
        loop.restart_clock()

    def wait(self) -> None:
        """Return when the last checkpoint counts."""
        self._checkpoints.wait()

    def on_finish(self, loop: Loop) -> None:
        """Wait for the last checkpoint."""
        self.wait()


class Stop(Callback):
    """On SIGINT or SIGTERM save after the update that is running, and end.

    The handlers that were there before come back at the end.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self._request = StopRequest()

    def on_start(self, loop: Loop) -> None:
        """Listen for signals."""
        self._request.__enter__()

    def after_step(self, loop: Loop) -> None:
        """Save and end if a signal came.

        Raises:
            Interrupted: naming the signal.
        """
        if self._request.signum is not None and not loop.is_last:
            self._save.save(loop)
            self._save.wait()
            raise Interrupted(self._request.signum)

    def on_end(self, loop: Loop) -> None:
        """Restore the handlers."""
        self._request.__exit__()


class Profile(Callback):
    """Trace some updates with `jax.profiler`, for TensorBoard or Perfetto.

    Args:
        folder: where the trace goes.
        updates: how many, after the first two.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        self._folder, self._updates = folder, updates
        self._until: int | None = None

    def before_step(self, loop: Loop, batch: Batch) -> None:
        """Start the trace at its first update."""
        if loop.step == loop.first + _PROFILE_AFTER:
            jax.profiler.start_trace(str(self._folder))
            self._until = loop.step + self._updates

    def after_step(self, loop: Loop) -> None:
        """Stop it after its last one."""
        if self._until is not None and (loop.step == self._until or loop.is_last):
            jax.block_until_ready(loop.trainer.state)
            self._stop()

    def on_end(self, loop: Loop) -> None:
        """Stop a trace that is open."""
        self._stop()

    def _stop(self) -> None:
        if self._until is not None:
            self._until = None
            jax.profiler.stop_trace()
