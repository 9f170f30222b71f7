"""dev-reasoning-v1: two kinds of word problems, two and three operations, worked out.

"Ann has 12 coins, finds 7 more and gives away 5. How many coins are left?"
-> 12 + 7 = 19; 19 - 5 = 14 -> 14
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 200
MAX_TRACES = 20_000
_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn")
_THINGS = ("coins", "apples", "books", "stamps", "marbles")


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield distinct problems, the two kinds in turn."""
    if not 1 <= num_traces <= MAX_TRACES:
        raise ValueError(f"num_traces must be from 1 to {MAX_TRACES:,}")
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < num_traces:
        trace = (_change, _shopping)[len(seen) % 2](rng)
        if trace.prompt not in seen:
            seen.add(trace.prompt)
            yield trace


def _change(rng: random.Random) -> ReasoningTrace:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b = rng.randint(5, 60), rng.randint(2, 40)
    c = rng.randint(1, a + b - 1)
    return reasoning_trace(
        f"{name} has {a} {thing}, finds {b} more and gives away {c}. How many {thing} are left?",
        [("calculation", f"{a} + {b} = {a + b}"), ("calculation", f"{a + b} - {c} = {a + b - c}")],
        str(a + b - c),
        meta={"family": "change", "difficulty": 1},
    )


def _shopping(rng: random.Random) -> ReasoningTrace:
    name = rng.choice(_NAMES)
    a, p, b, q = (rng.randint(2, 12) for _ in range(4))
    paid = a * p + b * q + rng.randint(1, 30)
    total = a * p + b * q
    return reasoning_trace(
        f"{name} buys {a} pens for {p} each and {b} pads for {q} each, and pays with {paid}."
        " How much comes back?",
        [
            ("calculation", f"{a} * {p} = {a * p}"),
            ("calculation", f"{b} * {q} = {b * q}"),
            ("calculation", f"{a * p} + {b * q} = {total}"),
            ("calculation", f"{paid} - {total} = {paid - total}"),
        ],
        str(paid - total),
        meta={"family": "shopping", "difficulty": 2},
    )
