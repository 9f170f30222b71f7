"""Confidence intervals of an evaluation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_mlflow.evaluation import statistics


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (190, 200, 0.9104, 0.9726),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval(successes: int, count: int, low: float, high: float) -> None:
    """Values from Newcombe's tables and the closed form."""
    interval = statistics.wilson(successes, count)
    assert interval.value == successes / count
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_value(pair: tuple[int, int]) -> None:
    """Ordered and inside 0..1."""
    interval = statistics.wilson(*pair)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_nothing_to_count() -> None:
    """No examples have no proportion."""
    with pytest.raises(ValueError, match="at least one"):
        statistics.wilson(0, 0)
