"""What must not get slow, as ratios of what runs in turns; never a time."""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np

from tests.conftest import ROOT, tiny
from tunix_mlflow.benchmarks import workload
from tunix_mlflow.config.load import load_config
from tunix_mlflow.runtime import devices
from tunix_mlflow.training.step import train_step

PAIRS = 7


def test_packing_pays() -> None:
    """Rows that share documents of mixed lengths train at least 1.3 times as many useful tokens a
    second as one document a row; 2.6 times as many fit. Documents fill at least 95 % of a row."""
    made = {}
    for packing in (True, False):
        overrides = tiny(
            data__sequence_length="256",
            data__packing=str(packing).lower(),
            model__width="64",
            training__batch_size="16",
            benchmark__data="mix",
        )
        config = load_config("shape-s", overrides, ROOT / "projects" / "configs")
        work = workload.made_up(config, devices.use("cpu"))
        made[packing] = [work.spec, work.state, work.batches]
    assert made[True][2].data.fill > 0.95
    rates: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1 + PAIRS):
        for packing, each in made.items():
            batch = each[2].at(step)
            begun = time.perf_counter()
            each[1], _ = train_step(each[1], batch, spec=each[0])
            jax.block_until_ready(each[1])
            if step:  # the first compiles
                useful = np.count_nonzero(batch.segments)
                rates[packing].append(useful / (time.perf_counter() - begun))
    pairs = zip(rates[True], rates[False], strict=True)
    assert statistics.median(packed / single for packed, single in pairs) > 1.3
