"""Suite `train`: the real step on the real pipeline, compilation apart from steady state.

What a user waits for is useful tokens per second: those that are not padding. The device is
waited for once, at the end of each repeat.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import jax
import numpy as np
import optax

from tunix_mlflow.config import BenchmarkConfig
from tunix_mlflow.data.batches import TrainBatches
from tunix_mlflow.models.decoder import Graph
from tunix_mlflow.training.step import TrainState, train_step


class Measured(NamedTuple):
    """Medians over the repeats, and each repeat."""

    compile_seconds: float  # the first step, which compiles or reads the cache
    step_time_ms: float
    step_times_ms: list[float]
    tokens_per_sec: float  # not counting padding
    tokens_per_secs: list[float]
    padded_tokens_per_sec: float  # counting it


def measure(
    config: BenchmarkConfig,
    state: TrainState,
    batches: TrainBatches,
    *,
    graph: Graph,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> Measured:
    """Time `repeats` runs of `steps` updates, after `warmup_steps` that do not count."""

    def run(first: int, count: int) -> tuple[float, int, int]:
        nonlocal state
        useful = padded = 0
        start = time.perf_counter()
        for step in range(first, first + count):
            batch = batches.at(step)
            useful += int(np.count_nonzero(batch.segments))
            padded += batch.segments.size
            state, _ = train_step(
                state, batch, graph=graph, optimizer=optimizer, microbatches=microbatches
            )
        jax.block_until_ready(state)
        return time.perf_counter() - start, useful, padded

    compile_seconds, _, _ = run(0, 1)
    run(1, config.warmup_steps)
    first = 1 + config.warmup_steps
    times, useful_rates, padded_rates = [], [], []
    for repeat in range(config.repeats):
        seconds, useful, padded = run(first + repeat * config.steps, config.steps)
        times.append(1000 * seconds / config.steps)
        useful_rates.append(useful / seconds)
        padded_rates.append(padded / seconds)
    return Measured(
        compile_seconds,
        statistics.median(times),
        times,
        statistics.median(useful_rates),
        useful_rates,
        statistics.median(padded_rates),
    )
