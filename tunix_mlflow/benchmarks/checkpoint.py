"""Suite `checkpoint`: what a save costs the loop, and how long a restore takes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax

from tunix_mlflow.benchmarks.workload import Workload
from tunix_mlflow.models import arrays
from tunix_mlflow.training.checkpoint import Checkpoints, Retention

EVERY = 50
"""Steps between two saves, for `CheckpointCost.share`."""


class CheckpointCost(NamedTuple):
    """The cost of one save, which is written in the background."""

    megabytes: float
    step_ms: list[float]  # without a save, one value for each block
    extra_ms: list[float]  # a block with a save, less the block beside it
    blocked_ms: float  # how long the loop waits for the copy
    sealed_ms: float  # from the start of the save until the checkpoint is complete
    share: float  # of the time of EVERY steps, by the median of `extra_ms`
    verify_ms: float  # sha256 of every file
    restore_ms: float  # that, and the arrays on the device


def measure(workload: Workload, folder: Path) -> CheckpointCost:
    """Train `repeats` pairs of blocks of `steps` updates, one block of each pair with a save.

    Args:
        workload: `benchmark.repeats` and `benchmark.steps` are read; a block should take longer
            than a save.
        folder: an empty one.
    """
    trainer, batches = workload.trainer, workload.batches
    repeats, steps = workload.config.benchmark.repeats, workload.config.benchmark.steps
    checkpoints = Checkpoints(folder, {}, retention=Retention(1))
    updates, blocked = 0, []

    def block(*, saves: bool) -> float:
        nonlocal updates
        start = time.perf_counter()
        if saves:
            checkpoints.save(updates, trainer.state)
            blocked.append(1000 * (time.perf_counter() - start))
        for _ in range(steps):
            metrics = trainer.step(batches.at(updates))
            updates += 1
            float(metrics.loss)
        jax.block_until_ready(trainer.state)
        if saves:
            checkpoints.wait()
        return 1000 * (time.perf_counter() - start)

    block(saves=True)  # compiles
    blocked.clear()
    step_ms, extra_ms = [], []
    for repeat in range(repeats):
        # In turns, so that a drift of the machine's speed favours neither.
        times = {saves: block(saves=saves) for saves in ((True, False), (False, True))[repeat % 2]}
        step_ms.append(times[False] / steps)
        extra_ms.append(times[True] - times[False])
    start = time.perf_counter()
    checkpoints.save(updates, trainer.state)
    checkpoints.wait()
    sealed = time.perf_counter() - start
    last = folder / f"{updates:08d}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    start = time.perf_counter()
    arrays.check(last)
    verified = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(updates, trainer.state))
    restored = time.perf_counter() - start
    checkpoints.close()
    return CheckpointCost(
        size / 1e6,
        step_ms,
        extra_ms,
        statistics.median(blocked),
        1000 * sealed,
        statistics.median(extra_ms) / (EVERY * statistics.median(step_ms)),
        1000 * verified,
        1000 * restored,
    )


def summary(cost: CheckpointCost) -> str:
    """Return the cost in a few sentences."""
    low, high = min(cost.extra_ms), max(cost.extra_ms)
    return (
        f"a save of {cost.megabytes:,.1f} MB blocks the loop for {cost.blocked_ms:.0f} ms, costs"
        f" {statistics.median(cost.extra_ms):.0f} ms in all ({low:.0f} to {high:.0f}), and is"
        f" complete after {cost.sealed_ms:.0f} ms: {cost.share:.2%} of {EVERY} steps of"
        f" {statistics.median(cost.step_ms):.0f} ms. Verified in {cost.verify_ms:.0f} ms,"
        f" restored in {cost.restore_ms:.0f} ms"
    )
