"""What must stay fast, as ratios of measurements taken in turns; never a time."""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np

from tests.conftest import tiny
from tunix_mlflow.benchmarks import workload
from tunix_mlflow.config.load import load_config
from tunix_mlflow.runtime import devices

PAIRS = 7


def test_packing_pays() -> None:
    """Rows that share documents of mixed lengths train at least 1.3 times as many useful tokens a
    second as one document a row; 2.6 times as many fit. Documents fill at least 95 % of a row."""
    workloads = {}
    for packing in (True, False):
        overrides = tiny(
            data__sequence_length="256",
            data__packing=str(packing).lower(),
            model__width="64",
            training__batch_size="16",
            benchmark__data="mix",
        )
        config = load_config("shape-s", overrides)
        workloads[packing] = workload.generated(config, devices.use("cpu"))
    assert workloads[True].batches.data.fill > 0.95
    rates: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1 + PAIRS):
        for packing, each in workloads.items():
            batch = each.batches.at(step)
            start = time.perf_counter()
            each.trainer.step(batch)
            jax.block_until_ready(each.trainer.state)
            if step:  # the first compiles
                useful = np.count_nonzero(batch.segments)
                rates[packing].append(useful / (time.perf_counter() - start))
    pairs = zip(rates[True], rates[False], strict=True)
    assert statistics.median(packed / single for packed, single in pairs) > 1.3
