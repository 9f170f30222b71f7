"""Suite `train`: the real step on the real pipeline, compilation apart from steady state.

What a user waits for is useful tokens per second: those that are not padding. The device is
waited for once, at the end of each repeat; for the percentiles, after each step of one more. The
share of the machine (MFU) is of what a large matrix product reaches here, in the same run: every
device has that figure, and no table of devices has every one. It is asked for before and after
each repeat, because a machine's mood changes.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunix_mlflow.config.schema import BenchmarkConfig, ModelConfig
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.runtime import devices
from tunix_mlflow.training.step import StepSpec, TrainState, compile_step, train_step


class Measured(NamedTuple):
    """Medians over the repeats, and each repeat."""

    compile_seconds: float  # the first step, which compiles or reads the cache
    step_time_ms: float
    step_times_ms: list[float]
    tokens_per_sec: float  # not counting padding
    tokens_per_secs: list[float]
    padded_tokens_per_sec: float  # counting it
    steps_ms: list[float]  # single steps, the device waited for after each
    step_p50_ms: float
    step_p95_ms: float
    flops_per_token: float  # of forward and backward pass, by formula
    gemm_peak_gflops: float  # per second, beside a repeat
    gemm_peaks_gflops: list[float]
    mfu: float  # 0..1
    mfus: list[float]
    peak_host_mb: float  # of this process so far
    peak_device_mb: float  # 0 where the device does not tell


def measure(
    config: BenchmarkConfig,
    state: TrainState,
    batches: TrainBatches,
    *,
    model: ModelConfig,
    spec: StepSpec,
    frozen: Params | None = None,
) -> Measured:
    """Time `repeats` runs of `steps` updates, after `warmup_steps` that do not count and one more
    before each run.

    Args:
        config: how often.
        state: donated to the first update.
        batches: where each step's batch comes from; making it is part of the step.
        model: the decoder's shape.
        plan: how an update is computed.
        frozen: the parameters beside adapters.
    """
    flops = flops_per_token(decoder.parameter_count(state.params), model, batches.data.length)
    if frozen is not None:  # which have no gradients
        flops += 4.0 * decoder.parameter_count(frozen)

    apart = 1  # devices that do not share cores
    if spec.mesh is not None and spec.mesh.devices.flat[0].platform != "cpu":
        apart = spec.mesh.size
    done = 0

    def run(updates: int) -> tuple[float, int, int]:
        nonlocal state, done
        useful = padded = 0
        start = time.perf_counter()
        for _ in range(updates):
            batch = batches.at(done)
            done += 1
            useful += int(np.count_nonzero(batch.segments))
            padded += batch.segments.size
            state, _ = train_step(state, batch, frozen, spec=spec)
        jax.block_until_ready(state)
        return time.perf_counter() - start, useful, padded

    def peak() -> float:
        reached = gemm_peak()
        run(1)  # after a pause a step takes longer
        return reached * apart

    start = time.perf_counter()
    compile_step(state, batches.at(0), frozen, spec=spec)
    devices.return_freed_memory()  # as the loop does
    run(1)
    compile_seconds = time.perf_counter() - start
    run(config.warmup_steps)
    times, useful_rates, padded_rates = [], [], []
    peaks = [peak()]
    for _ in range(config.repeats):
        seconds, useful, padded = run(config.steps)
        times.append(1000 * seconds / config.steps)
        useful_rates.append(useful / seconds)
        padded_rates.append(padded / seconds)
        peaks.append(peak())
    singles = [1000 * run(1)[0] for _ in range(config.steps)]
    # Scaled before the median: the median of two is their mean, and a mean of scaled numbers is
    # not bit for bit the scaled mean.
    gemm_peaks = [max(pair) / 1e9 for pair in itertools.pairwise(peaks)]
    shares = [
        rate * flops / (1e9 * most) for rate, most in zip(padded_rates, gemm_peaks, strict=True)
    ]
    return Measured(
        compile_seconds,
        statistics.median(times),
        times,
        statistics.median(useful_rates),
        useful_rates,
        statistics.median(padded_rates),
        singles,
        float(np.percentile(singles, 50)),
        float(np.percentile(singles, 95)),
        flops,
        statistics.median(gemm_peaks),
        gemm_peaks,
        statistics.median(shares),
        shares,
        _peak_host_mb(),
        _peak_device_mb(state),
    )


@contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Leave a trace of `jax.profiler` in a folder, for TensorBoard or Perfetto; None: do not."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(str(folder)):
        yield


def plot(steps_ms: Sequence[float], path: Path) -> None:
    """Draw single steps, one after the other, with their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(steps_ms) + 1), steps_ms, marker=".", linewidth=0.8)
    axes.axhline(statistics.median(steps_ms), color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel="ms", ylim=(0, None), title="single steps; dashed: their median")
    figure.savefig(path, dpi=120)


def flops_per_token(parameters: int, model: ModelConfig, length: int) -> float:
    """6 N + 12 L W T: products of forward and backward pass (Chowdhery et al. 2022, appendix B).

    Args:
        parameters: N.
        model: L layers; W is the width of all its query heads.
        length: T, tokens in a row.
    """
    heads = model.heads * model.head_width
    return 6.0 * parameters + 12.0 * model.layers * heads * length


def gemm_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of the quickest float32 product of two square matrices, of some tries."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _peak_host_mb() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6


def _peak_device_mb(state: TrainState) -> float:
    return max(
        float((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) / 1e6
        for device in state.step.devices()
    )
