"""column-addition-v1: sums of two numbers, worked out column by column.

    "What is 357 + 98?" -> 7+8+0=15; 5+9+1=15; 3+0+1=4 -> 455

Each step adds the digits of one column and the carry that came in. 20,400 distinct sums: of
those whose prompts have the lowest sha256, 200 are the split `test` and the next 200 `validation`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 20_400
HELD_OUT_SHARE = 200 / 20_400  # of each of the two splits


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield distinct ordered pairs of numbers from 1 to 999, in random order."""
    if not 1 <= num_traces <= 999 * 999:
        raise ValueError("num_traces must be from 1 to 998,001")
    pairs = random.Random(seed).sample(range(999 * 999), num_traces)
    prompts = {pair: f"What is {pair // 999 + 1} + {pair % 999 + 1}?" for pair in pairs}
    by_hash = sorted(pairs, key=lambda pair: hashlib.sha256(prompts[pair].encode()).digest())
    held_out = round(num_traces * HELD_OUT_SHARE)
    test, validation = set(by_hash[:held_out]), set(by_hash[held_out : 2 * held_out])
    for pair in pairs:
        a, b = pair // 999 + 1, pair % 999 + 1
        steps, carries = _columns(a, b)
        yield reasoning_trace(
            prompts[pair],
            steps,
            str(a + b),
            split="test" if pair in test else "validation" if pair in validation else "train",
            meta={"digits": max(len(str(a)), len(str(b))), "carries": carries},
        )


def _columns(a: int, b: int) -> tuple[list[tuple[str, str]], int]:
    steps: list[tuple[str, str]] = []
    carry = carries = 0
    while a or b:
        total = a % 10 + b % 10 + carry
        steps.append(("column", f"{a % 10}+{b % 10}+{carry}={total}"))
        carry = total // 10
        carries += carry
        a, b = a // 10, b // 10
    return steps, carries
