"""A seed as another package would bring it."""

from __future__ import annotations

from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 3


def generate(*, seed: int, num_traces: int) -> Iterator[ReasoningTrace]:
    for n in range(num_traces):
        yield reasoning_trace(f"{seed} and {n}?", [("sum", f"{seed}+{n}")], str(seed + n))
