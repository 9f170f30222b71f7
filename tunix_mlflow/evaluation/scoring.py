"""Score examples: generate, compare, aggregate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from tunix_mlflow.data.examples import Example, expected_answer
from tunix_mlflow.evaluation import scorers
from tunix_mlflow.evaluation.statistics import Proportion, wilson
from tunix_mlflow.text import answers


class Completed(Protocol):
    """A completion, as :class:`models.bundle.Completion`."""

    @property
    def text(self) -> str | None:
        """What was generated."""

    @property
    def answer(self) -> str | None:
        """The answer in it."""

    @property
    def finish_reason(self) -> str | None:
        """What ended it."""

    @property
    def error(self) -> str | None:
        """Why there is none."""


class ExampleScore(NamedTuple):
    """The score of one example: a row of the per-example table."""

    prompt: str
    expected: str
    answer: str | None
    correct: bool
    text: str | None
    finish_reason: str | None  # stop; length: its limit cut it off, which leaves no answer
    error: str | None  # why the model could not be asked


def scorable(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return the first `limit` examples that have an expected answer; None: all of them."""
    return [e for e in examples if expected(e) is not None][:limit]


def expected(example: Example) -> str | None:
    """Return the answer that a completion has to have; None: there is none to compare with."""
    text = expected_answer(example)
    if text is None or example.answer is not None:
        return text and text.strip()
    return answers.read_answer(text, marked=False)


def score(
    examples: Sequence[Example],
    generate: Callable[[Sequence[Example]], Sequence[Completed]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[ExampleScore]:
    """Generate completions, `batch_size` examples at a time, and score their answers.

    Args:
        examples: each with an expected answer; see :func:`scorable`.
        generate: returns a completion for each of a batch of examples.
        batch_size: examples per call of `generate`.
        progress: called with the number of examples done.
    """
    scores: list[ExampleScore] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for example, done in zip(batch, generate(batch), strict=True):
            answer = expected(example) or ""
            correct = scorers.exact_match(done.answer, answer)
            scores.append(
                ExampleScore(
                    prompt=example.prompt,
                    expected=answer,
                    answer=done.answer,
                    correct=correct,
                    text=done.text,
                    finish_reason=done.finish_reason,
                    error=done.error,
                )
            )
        progress(len(scores))
    return scores


def table(scores: Sequence[ExampleScore]) -> dict[str, list[object]]:
    """Return the per-example table, by column."""
    return {name: [getattr(row, name) for row in scores] for name in ExampleScore._fields}


def exact_match(scores: Sequence[ExampleScore]) -> Proportion:
    """Return the proportion of correct answers."""
    return wilson(sum(row.correct for row in scores), len(scores))
