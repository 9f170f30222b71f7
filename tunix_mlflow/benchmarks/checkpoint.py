"""Suite `checkpoint`: what a save costs the loop, and what it takes to come back."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax

from tunix_mlflow.config.schema import BenchmarkConfig
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.models import arrays
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.training.checkpoint import Checkpoints, Retention
from tunix_mlflow.training.step import StepSpec, TrainState, train_step

EVERY = 50
"""Steps between two saves, that the share is of."""


class Cost(NamedTuple):
    """Of one save, in the background."""

    megabytes: float
    step_ms: list[float]  # without a save, a block each
    extra_ms: list[float]  # that a block with a save took longer than the one beside it
    blocked_ms: float  # the loop waits so long for the copy
    sealed_ms: float  # until it counts, from the start of the save
    share: float  # of the time of EVERY steps, by the median of `extra_ms`
    verify_ms: float  # every file's sha256
    restore_ms: float  # that, and the arrays on the device


def measure(
    config: BenchmarkConfig,
    spec: StepSpec,
    state: TrainState,
    batches: TrainBatches,
    folder: Path,
    frozen: Params | None = None,
) -> Cost:
    """Train `repeats` pairs of blocks of `steps` updates, one of a pair with a save.

    Args:
        config: how many; a block should outlast a save.
        plan: how an update is computed.
        state: donated.
        batches: of each update.
        folder: an empty one.
        frozen: the parameters beside adapters.
    """
    kept = Checkpoints(folder, {}, retention=Retention(1))
    done, blocked = 0, []

    def block(*, saves: bool) -> float:
        nonlocal state, done
        begun = time.perf_counter()
        if saves:
            kept.save(done, state)
            blocked.append(1000 * (time.perf_counter() - begun))
        for _ in range(config.steps):
            state, metrics = train_step(state, batches.at(done), frozen, spec=spec)
            done += 1
            float(metrics.loss)
        jax.block_until_ready(state)
        if saves:
            kept.wait()
        return 1000 * (time.perf_counter() - begun)

    block(saves=True)
    blocked.clear()
    plain, extra = [], []
    for repeat in range(config.repeats):
        took = {saves: block(saves=saves) for saves in ((True, False), (False, True))[repeat % 2]}
        plain.append(took[False] / config.steps)
        extra.append(took[True] - took[False])
    begun = time.perf_counter()
    kept.save(done, state)
    kept.wait()
    sealed = time.perf_counter() - begun
    last = folder / f"{done:08d}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    begun = time.perf_counter()
    arrays.check(last)
    verified = time.perf_counter() - begun
    begun = time.perf_counter()
    jax.block_until_ready(kept.restore(done, state))
    restored = time.perf_counter() - begun
    kept.close()
    return Cost(
        size / 1e6,
        plain,
        extra,
        statistics.median(blocked),
        1000 * sealed,
        statistics.median(extra) / (EVERY * statistics.median(plain)),
        1000 * verified,
        1000 * restored,
    )
