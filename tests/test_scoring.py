"""Aggregation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunix_mlflow.evaluation import scoring


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
    found = scoring.wilson(successes, count)
    assert found.value == successes / count
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_holds_the_value(pair: tuple[int, int]) -> None:
    """Ordered and inside 0..1."""
    found = scoring.wilson(*pair)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_nothing_to_count() -> None:
    """No examples have no share."""
    with pytest.raises(ValueError, match="at least one"):
        scoring.wilson(0, 0)
