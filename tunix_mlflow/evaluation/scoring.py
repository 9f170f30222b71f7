"""Scores a split: generate, compare, aggregate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tunix_mlflow.data.examples import Example, expected_answer
from tunix_mlflow.evaluation import scorers

Z_95 = 1.959963984540054


class ExampleScore(NamedTuple):
    """One scored example; a row of the per-example table."""

    prompt: str
    expected: str
    answer: str | None
    correct: bool
    text: str


class Proportion(NamedTuple):
    """A share of successes with its 95 % Wilson interval, all in 0..1."""

    value: float
    low: float
    high: float
    examples: int


def wilson(successes: int, count: int) -> Proportion:
    """Wilson's score interval (1927), which holds at 0 % and 100 % too.

    Raises:
        ValueError: when there is nothing to count.
    """
    if count < 1:
        raise ValueError("an interval needs at least one trial")
    share = successes / count
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the bound is the end itself; floating point may miss it by one unit.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == count else centre + half
    return Proportion(share, low, high, count)


def scorable(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Those with an expected answer, the first `limit` of them."""
    return [e for e in examples if expected_answer(e) is not None][:limit]


def score(
    examples: Sequence[Example],
    generate: Callable[[Sequence[Example]], list[tuple[str, str | None]]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[ExampleScore]:
    """Compare answers with what was expected, `batch_size` examples at a time.

    Args:
        examples: with an answer.
        generate: text and answer for each of the examples it is given.
        batch_size: how many it is given at a time.
        progress: told how many are done.
    """
    judged: list[ExampleScore] = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        for example, (text, answer) in zip(part, generate(part), strict=True):
            expected = expected_answer(example) or ""
            correct = scorers.exact_match(answer, expected)
            judged.append(ExampleScore(example.prompt, expected, answer, correct, text))
        progress(len(judged))
    return judged


def table(judged: Sequence[ExampleScore]) -> dict[str, list[object]]:
    """The per-example table, by column."""
    return {name: [getattr(row, name) for row in judged] for name in ExampleScore._fields}


def exact_match(judged: Sequence[ExampleScore]) -> Proportion:
    """The share of right answers."""
    return wilson(sum(row.correct for row in judged), len(judged))
