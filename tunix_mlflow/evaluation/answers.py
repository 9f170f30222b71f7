"""From generated text to an answer, and from two answers to a match."""

from __future__ import annotations

from tunix_mlflow.data.chat import ANSWER, EOS


def extract(text: str) -> str | None:
    """The answer in a completion: what follows the last answer marker, up to the end.

    Returns:
        The stripped answer, or None when the completion never came to one.
    """
    _, marker, answer = text.rpartition(ANSWER)
    if not marker:
        return None
    return answer.partition(EOS)[0].strip()


def normalize(answer: str) -> str:
    """Case folded, one space between words, none around them."""
    return " ".join(answer.split()).casefold()


def exact_match(predicted: str | None, expected: str) -> bool:
    """Whether the two are the same after :func:`normalize`; no answer never matches."""
    return predicted is not None and normalize(predicted) == normalize(expected)
