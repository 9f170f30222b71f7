"""Suite `train`: the real step on the real pipeline, compilation apart from steady state.

What a user waits for is useful tokens per second: those that are not padding. The device is
waited for once, at the end of each repeat; for the percentiles, after each of some more steps.
The model FLOPs utilization (MFU) is relative to what a large matmul reaches on this machine, in
the same run: every device has that figure, and no table of devices is complete. It is measured
before and after each repeat, because the speed of a machine changes.
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

from tunix_mlflow.benchmarks.workload import Workload
from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.models import decoder
from tunix_mlflow.training.trainer import Trainer


class StepFigures(NamedTuple):
    """Medians over the repeats, and each repeat."""

    compile_seconds: float  # the first step, which compiles or reads the cache
    step_time_ms: float
    step_times_ms: list[float]
    tokens_per_sec: float  # without padding
    tokens_per_secs: list[float]
    padded_tokens_per_sec: float  # with padding
    steps_ms: list[float]  # single steps, the device waited for after each
    step_p50_ms: float
    step_p95_ms: float
    flops_per_token: float  # of forward and backward pass, by formula
    gemm_peak_gflops: float  # per second, beside a repeat
    gemm_peaks_gflops: list[float]
    mfu: float  # 0..1
    mfus: list[float]
    peak_host_mb: float  # of this process so far
    peak_device_mb: float  # 0 where the device does not report it


def measure(workload: Workload) -> StepFigures:
    """Time `repeats` runs of `steps` updates.

    `warmup_steps` updates at the beginning, and one before each run, do not count. Making a batch
    is part of a step.

    Args:
        workload: `benchmark.repeats`, `.steps` and `.warmup_steps` are read.
    """
    trainer, batches = workload.trainer, workload.batches
    config = workload.config.benchmark
    flops = flops_per_token(
        decoder.parameter_count(trainer.state.params), workload.config.model, batches.data.length
    )
    if trainer.frozen is not None:  # which have no gradients
        flops += 4.0 * decoder.parameter_count(trainer.frozen)

    independent = 1  # devices that do not share cores
    mesh = trainer.spec.mesh
    if mesh is not None and mesh.devices.flat[0].platform != "cpu":
        independent = mesh.size
    updates = 0

    def run(count: int) -> tuple[float, int, int]:
        nonlocal updates
        useful = padded = 0
        start = time.perf_counter()
        for _ in range(count):
            batch = batches.at(updates)
            updates += 1
            useful += int(np.count_nonzero(batch.segments))
            padded += batch.segments.size
            trainer.step(batch)
        jax.block_until_ready(trainer.state)
        return time.perf_counter() - start, useful, padded

    def peak() -> float:
        flops_per_second = gemm_peak()
        run(1)  # after a pause a step takes longer
        return flops_per_second * independent

    start = time.perf_counter()
    trainer.compile(batches.at(0))
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
    single_ms = [1000 * run(1)[0] for _ in range(config.steps)]
    # Scaled before the median: the median of two is their mean, and a mean of scaled numbers is
    # not bit for bit the scaled mean.
    gemm_peaks = [max(pair) / 1e9 for pair in itertools.pairwise(peaks)]
    mfus = [
        rate * flops / (1e9 * highest)
        for rate, highest in zip(padded_rates, gemm_peaks, strict=True)
    ]
    return StepFigures(
        compile_seconds,
        statistics.median(times),
        times,
        statistics.median(useful_rates),
        useful_rates,
        statistics.median(padded_rates),
        single_ms,
        float(np.percentile(single_ms, 50)),
        float(np.percentile(single_ms, 95)),
        flops,
        statistics.median(gemm_peaks),
        gemm_peaks,
        statistics.median(mfus),
        mfus,
        _peak_host_mb(),
        _peak_device_mb(trainer),
    )


def summary(figures: StepFigures) -> str:
    """Return the figures in a few sentences."""
    low, high = min(figures.tokens_per_secs), max(figures.tokens_per_secs)
    return (
        f"{figures.tokens_per_sec:,.0f} tokens/s ({low:,.0f} to {high:,.0f}),"
        f" {figures.step_time_ms:.1f} ms a step (95 % below {figures.step_p95_ms:.1f} ms), the"
        f" first {figures.compile_seconds:.1f} s; {figures.mfu:.0%} ({min(figures.mfus):.0%} to"
        f" {max(figures.mfus):.0%}) of {figures.gemm_peak_gflops:,.0f} GFLOP/s, which a large"
        f" matmul reaches; {figures.peak_host_mb:,.0f} MB"
    )


@contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Write a trace of `jax.profiler` into a folder, for TensorBoard or Perfetto; None: do not."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(str(folder)):
        yield


def plot(single_ms: Sequence[float], path: Path) -> None:
    """Draw single steps, one after the other, with their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(single_ms) + 1), single_ms, marker=".", linewidth=0.8)
    axes.axhline(statistics.median(single_ms), color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel="ms", ylim=(0, None), title="single steps; dashed: their median")
    figure.savefig(path, dpi=120)


def flops_per_token(parameters: int, model: ModelConfig, length: int) -> float:
    """Return 6 N + 12 L W T, the FLOPs of the matmuls of forward and backward pass.

    As in Chowdhery et al. 2022, appendix B.

    Args:
        parameters: N.
        model: L layers; W is the width of all its query heads.
        length: T, tokens in a row.
    """
    heads = model.heads * model.head_width
    return 6.0 * parameters + 12.0 * model.layers * heads * length


def gemm_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOP/s of the fastest of several float32 matmuls of two square matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    matmul = jax.jit(jnp.matmul)
    matmul(a, a).block_until_ready()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        matmul(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _peak_host_mb() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6


def _peak_device_mb(trainer: Trainer) -> float:
    return max(
        float((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) / 1e6
        for device in trainer.state.step.devices()
    )
