"""The training loop. It knows nothing of MLflow: everything around an update is a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tunix_mlflow.errors import TrainingStopped
from tunix_mlflow.input.batches import Batch, TrainBatches
from tunix_mlflow.training import optimizer as optimizers
from tunix_mlflow.training.step import StepMetrics
from tunix_mlflow.training.trainer import Trainer


class Callback:
    """What a loop calls around its updates; a subclass overrides what it needs."""

    def on_start(self, loop: Loop) -> None:
        """Act before the first update."""

    def before_step(self, loop: Loop, batch: Batch) -> None:
        """Act before the update `loop.step + 1` is dispatched."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of update `step`, or of an evaluation after it."""

    def on_flush(self) -> None:
        """Make what was taken durable."""

    def after_step(self, loop: Loop) -> None:
        """Act after the update `loop.step` was dispatched."""

    def on_finish(self, loop: Loop) -> None:
        """Act after the last update, when nothing has failed."""

    def on_end(self, loop: Loop) -> None:
        """Clean up, however the loop ends."""


class PendingStep(NamedTuple):
    """An update that was dispatched and whose metrics were not fetched yet."""

    step: int  # updates done after it, from 1
    metrics: StepMetrics
    tokens: int  # that are not padding
    input_wait: float  # seconds


class Loop:
    """Where a training is; handed to every callback.

    Attributes:
        trainer: what is trained.
        first, last: updates done before and after the loop.
        step: updates dispatched so far.
        eval_metrics: of the evaluation after this step; empty if there was none.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[Callback]) -> None:
        self.trainer, self.callbacks = trainer, callbacks
        self.first = self.step = trainer.updates
        self.last = trainer.config.training.steps
        self.eval_metrics: dict[str, float] = {}
        self.compile_seconds = 0.0
        self._rates = optimizers.learning_rates(trainer.config.optimizer, self.last)
        self._pending: PendingStep | None = None
        self._clock = time.perf_counter()

    @property
    def is_last(self) -> bool:
        """Whether the update that was dispatched is the last one."""
        return self.step == self.last

    def is_due(self, every: int) -> bool:
        """Return whether what happens every so many updates, and after the last, is due."""
        return every > 0 and (self.step % every == 0 or self.is_last)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand metrics to every callback.

        Raises:
            TrainingStopped: if one is not finite.
        """
        for key, value in metrics.items():
            if not math.isfinite(value):
                self.stop(f"step {step}: {key} is {value}")
        for callback in self.callbacks:
            callback.on_metrics(step, metrics)

    def stop(self, reason: str) -> None:
        """End the training.

        Raises:
            TrainingStopped: always.
        """
        raise TrainingStopped(f"{reason}; lower optimizer.learning_rate")

    def flush(self) -> None:
        """Make everything that was recorded durable."""
        for callback in self.callbacks:
            callback.on_flush()

    def restart_clock(self) -> None:
        """Leave what has just happened out of the time of the next step."""
        self._clock = time.perf_counter()

    def set_pending(self, pending: PendingStep) -> None:
        """Remember an update that was dispatched."""
        self._pending = pending

    def flush_pending(self) -> None:
        """Fetch the metrics of the update that was dispatched last, and record them.

        Raises:
            TrainingStopped: if loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        loss, grad_norm = float(pending.metrics.loss), float(pending.metrics.grad_norm)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": float(self._rates[pending.step - 1]),
            "train/tokens": float(pending.tokens),
        }
        if pending.step == self.first + 1:
            metrics["train_perf/first_step_ms"] = 1000 * seconds
            metrics["train_perf/compile_ms"] = 1000 * self.compile_seconds
        else:
            metrics["train_perf/step_time_ms"] = 1000 * seconds
            metrics["train_perf/tokens_per_sec"] = pending.tokens / seconds
            metrics["train_perf/input_wait_ms"] = 1000 * pending.input_wait
        self.record(pending.step, metrics)


def fit(trainer: Trainer, batches: TrainBatches, callbacks: Sequence[Callback]) -> None:
    """Train to `trainer.config.training.steps`.

    The order within a step must not change. The update is dispatched first, and the metrics of the
    one before are fetched while it runs, so that the device never waits for Python; a thread makes
    the next batch meanwhile. Then the callbacks act in the order in which they are given, which for
    training is: log, evaluate, save, stop, profile. Evaluation comes before the checkpoint: a run
    that dies between the two repeats both, and never resumes behind an evaluation that it lost.
    Metrics are fetched, found finite and flushed before a checkpoint, so that no checkpoint is
    ahead of the record or holds a parameter that is not finite.

    Args:
        trainer: its state says where to begin.
        batches: `at(step)` is the batch of update `step`, from 0.
        callbacks: see `tunix_mlflow.training.callbacks`.

    Raises:
        TrainingStopped: when a loss or a parameter is not finite, naming the step.
        Interrupted: after SIGINT or SIGTERM, with the callback `Stop`.
    """
    loop = Loop(trainer, callbacks)
    started: list[Callback] = []
    try:
        for callback in callbacks:
            started.append(callback)
            callback.on_start(loop)
        _run(loop, batches)
        for callback in callbacks:
            callback.on_finish(loop)
    finally:
        for callback in reversed(started):
            callback.on_end(loop)


def _run(loop: Loop, batches: TrainBatches) -> None:
    trainer = loop.trainer
    with ThreadPoolExecutor(1, "input") as pool:
        upcoming = pool.submit(batches.at, loop.first)
        for index in range(loop.first, loop.last):
            start = time.perf_counter()
            batch = upcoming.result()
            input_wait = time.perf_counter() - start
            if index == loop.first:
                loop.compile_seconds = trainer.compile(batch)
            if index + 1 < loop.last:
                upcoming = pool.submit(batches.at, index + 1)
            for callback in loop.callbacks:
                callback.before_step(loop, batch)
            metrics = trainer.step(batch)
            loop.flush_pending()
            loop.step = index + 1
            tokens = int(np.count_nonzero(batch.segments))
            loop.set_pending(PendingStep(loop.step, metrics, tokens, input_wait))
            loop.eval_metrics = {}
            for callback in loop.callbacks:
                callback.after_step(loop)
    loop.flush_pending()
