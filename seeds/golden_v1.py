"""golden-v1: five hand-written traces, one for each case that evaluators get wrong."""

from __future__ import annotations

from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 5

_CASES = (
    ("basic_math", "What is 2+2?", ("calculation", "2 + 2 = 4"), "4"),
    (
        "knowledge",
        "Capital of France?",
        ("recall", "The capital of France is Paris."),
        "Paris",
    ),
    (
        "normalization",
        "  Normalize  Whitespace  ",
        ("reasoning", "Lower the case and keep one space between words."),
        "normalize whitespace",
    ),
    (
        "format",
        "Answer Format Test",
        ("reasoning", "The answer has the form 'Answer: ...'."),
        "Answer: Correct",
    ),
    ("boolean", "Is this correct?", ("reasoning", "Nothing speaks against it."), "Yes"),
)


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield the first `num_traces` of the five; `seed` changes nothing."""
    if not 1 <= num_traces <= len(_CASES):
        raise ValueError(f"num_traces must be from 1 to {len(_CASES)}")
    for case, prompt, step, answer in _CASES[:num_traces]:
        yield reasoning_trace(prompt, [step], answer, meta={"golden": "v1", "case": case})
