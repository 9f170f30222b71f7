"""The training loop. It knows nothing of MLflow: writers and evaluators are arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import Interrupted, TrainingStopped
from tunix_mlflow.input.batches import Batch, TrainBatches
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.signals import StopRequest
from tunix_mlflow.training import optimizer as optimizers
from tunix_mlflow.training.checkpoint import Checkpoints
from tunix_mlflow.training.step import (
    StepMetrics,
    StepSpec,
    TrainState,
    compile_step,
    eval_step,
    is_finite,
    train_step,
)
from tunix_mlflow.training.writers import MetricWriter


class _Flight(NamedTuple):
    """An update that was dispatched and whose metrics were not fetched yet."""

    step: int  # updates done after it, from 1
    metrics: StepMetrics
    tokens: int  # that are not padding
    waited: float  # seconds, for the batch


def fit(
    config: Config,
    state: TrainState,
    batches: TrainBatches,
    *,
    spec: StepSpec,
    writers: Sequence[MetricWriter],
    checkpoints: Checkpoints,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    frozen: Params | None = None,
    compiled: Future[float] | None = None,
) -> TrainState:
    """Train from `state.step` to `config.training.steps`.

    The order within a step must not change. The update is dispatched first, and the metrics
    of the one before are fetched while it runs, so that the device never waits for Python; a
    thread makes the batch after it meanwhile.
    Evaluation comes before the checkpoint: a run that dies between the two repeats both, and
    never resumes behind an evaluation that it lost. Metrics are fetched, found finite and
    flushed before a checkpoint, so that no checkpoint is ahead of the record or poisoned.

    Args:
        config: read for `training` and `optimizer`.
        state: donated to the first update.
        batches: `at(step)` is the batch of update `step`.
        plan: how an update is computed.
        writers: receive `train/*`, `perf/*` and `eval/*`.
        checkpoints: where to save.
        evaluate: held-out metrics of a state; None: there is nothing held out.
        frozen: the parameters beside adapters; None: all are trained.
        compiled: the update is being compiled, and tells the seconds that it took.

    Returns:
        The last state; its checkpoint is sealed.

    Raises:
        TrainingStopped: when a loss or a parameter is not finite, naming the step.
        Interrupted: after SIGINT or SIGTERM; the state was saved first.
    """
    training = config.training
    rates = optimizers.learning_rates(config.optimizer, training.steps)
    remedy = "lower optimizer.learning_rate"
    flight: _Flight | None = None
    first = int(state.step)
    clock = time.perf_counter()
    compiling = 0.0  # seconds, of the first step
    saved = time.monotonic()
    patience = 60 * (training.save_every_minutes or math.inf)

    def land() -> None:
        nonlocal flight, clock
        if flight is None:
            return
        landed, flight = flight, None
        loss, grad_norm = float(landed.metrics.loss), float(landed.metrics.grad_norm)
        now = time.perf_counter()
        seconds, clock = now - clock, now
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingStopped(
                f"step {landed.step}: train/loss is {loss} and train/grad_norm {grad_norm};"
                f" {remedy}"
            )
        scalars = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": float(rates[landed.step - 1]),
            "train/tokens": landed.tokens,
        }
        if landed.step == first + 1:
            scalars["perf/first_step_ms"] = 1000 * seconds
            scalars["perf/compile_ms"] = 1000 * compiling
        else:
            scalars["perf/step_time_ms"] = 1000 * seconds
            scalars["perf/tokens_per_sec"] = landed.tokens / seconds
            scalars["perf/input_wait_ms"] = 1000 * landed.waited
        for writer in writers:
            writer.write_scalars(landed.step, scalars)

    def save(step: int, held_out: dict[str, float]) -> None:
        nonlocal saved
        if not bool(is_finite(state.params)):
            raise TrainingStopped(f"step {step}: a parameter is not finite; {remedy}")
        for writer in writers:
            writer.flush()
        checkpoints.save(step, state, held_out)
        saved = time.monotonic()

    with StopRequest() as stop, ThreadPoolExecutor(1, "input") as pool:
        upcoming = pool.submit(batches.at, first)
        for step in range(first, training.steps):
            asked = time.perf_counter()
            batch = upcoming.result()
            waited = time.perf_counter() - asked
            done = step + 1
            if step == first:
                ahead = compiled.result() if compiled is not None else 0.0
                now = time.perf_counter()
                compile_step(state, batch, frozen, spec=spec)  # at once, if it was ahead
                compiling = ahead + time.perf_counter() - now
                devices.return_freed_memory()
            if done < training.steps:
                upcoming = pool.submit(batches.at, done)
            state, metrics = train_step(state, batch, frozen, spec=spec)
            land()
            flight = _Flight(done, metrics, int(np.count_nonzero(batch.segments)), waited)
            held_out: dict[str, float] = {}
            if evaluate is not None and _due(done, training.eval_every_steps, training.steps):
                land()
                held_out = evaluate(state)
                bad = [key for key, value in held_out.items() if not math.isfinite(value)]
                if bad:
                    raise TrainingStopped(f"step {done}: {bad[0]} is not finite; {remedy}")
                for writer in writers:
                    writer.write_scalars(done, held_out)
                clock = time.perf_counter()
            late = time.monotonic() - saved > patience
            last = done == training.steps
            if last or late or _due(done, training.save_every_steps, training.steps):
                land()
                save(done, held_out)
                clock = time.perf_counter()
            if stop.signum is not None and done < training.steps:
                land()
                save(done, held_out)
                checkpoints.wait()
                raise Interrupted(stop.signum)
    checkpoints.wait()
    return state


def held_out_loss(
    spec: StepSpec, params: Params, batches: Iterator[Batch], frozen: Params | None = None
) -> dict[str, float]:
    """`eval/loss` in nats per trained token: summed on the device, divided once."""
    sums = [eval_step(params, batch, frozen, spec=spec) for batch in batches]
    losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
    return {"eval/loss": float(np.sum(losses, dtype=np.float64) / np.sum(counts))}


def _due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)
