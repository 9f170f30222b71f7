"""Confidence intervals of what an evaluation measures."""

from __future__ import annotations

import math
from typing import NamedTuple

Z_95 = 1.959963984540054  # normal quantile of a two-sided interval of 95 %


class Proportion(NamedTuple):
    """A proportion with its 95 % Wilson interval, all in 0..1."""

    value: float
    low: float
    high: float
    examples: int


def wilson(successes: int, count: int) -> Proportion:
    """Return Wilson's score interval (1927), which holds at 0 % and 100 % too.

    Raises:
        ValueError: if `count` is 0.
    """
    if count < 1:
        raise ValueError("an interval needs at least one trial")
    value = successes / count
    spread = Z_95**2 / count
    center = (value + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(value * (1 - value) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the bound is the end itself; floating point may miss it by one unit.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == count else center + half
    return Proportion(value, low, high, count)
