"""Comparisons of a predicted answer with the expected one."""

from __future__ import annotations


def normalize(answer: str) -> str:
    """Return an answer case-folded, with single spaces between words and none around them."""
    return " ".join(answer.split()).casefold()


def exact_match(predicted: str | None, expected: str) -> bool:
    """Return whether both are equal after :func:`normalize`; None equals nothing."""
    return predicted is not None and normalize(predicted) == normalize(expected)
