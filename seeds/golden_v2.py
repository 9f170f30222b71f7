"""golden-v2: sums and repeated words, half and half; 100 traces with 67 distinct prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 100
_WORDS = ("apple", "banana", "cherry", "date", "elderberry")


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield `num_traces` // 2 sums, then the repetitions."""
    if num_traces < 1:
        raise ValueError("num_traces must be at least 1")
    rng = random.Random(seed)
    for idx in range(num_traces):
        meta = {"golden": "v2", "case": "math_gen", "idx": idx}
        if idx < num_traces // 2:
            a, b = rng.randint(1, 100), rng.randint(1, 100)
            step = ("calculation", f"Calculating {a} + {b} = {a + b}")
            yield reasoning_trace(f"What is {a} + {b}?", [step], str(a + b), meta=meta)
        else:
            meta["case"] = "text_gen"
            word = rng.choice(_WORDS)
            n = rng.randint(2, 5)
            step = ("reasoning", f"Repeating {word} {n} times")
            yield reasoning_trace(
                f"Repeat '{word}' {n} times", [step], " ".join([word] * n), meta=meta
            )
