"""When two answers are the same."""

from __future__ import annotations


def normalize(answer: str) -> str:
    """Case folded, one space between words, none around them."""
    return " ".join(answer.split()).casefold()


def exact_match(predicted: str | None, expected: str) -> bool:
    """Whether the two are the same after :func:`normalize`; no answer never matches."""
    return predicted is not None and normalize(predicted) == normalize(expected)
