"""What a user may log as a metric: the value and the step as plain Python numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from tunix_mlflow.errors import TrackingError


def split_values(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Separate the values that can be recorded from those that cannot.

    Args:
        metrics: key -> a number, a NumPy or JAX scalar, or an array of one element.

    Returns:
        The values as floats, and by key why the others are left out.
    """
    good: dict[str, float] = {}
    bad: dict[str, str] = {}
    for key, value in metrics.items():
        if type(key) is not str:
            bad[str(key)] = f"the key is {type(key).__name__}, expected str"
            continue
        if not key.isascii():
            key = to_text(key)
        try:
            number = value if type(value) is float else to_float(value)
        except (TypeError, ValueError, OverflowError):
            bad[key] = f"the value is {str(value)[:40]!r} ({type(value).__name__}), not a number"
            continue
        if math.isfinite(number):
            good[key] = number
        else:
            bad[key] = f"the value is {number}"
    return good, bad


def to_float(value: Any) -> float:
    """Return a number, or an array of one element, as a float.

    Raises:
        TypeError: for text or what is no number.
        ValueError: for an array of several elements.
        OverflowError: for an integer that no float can hold.
    """
    if isinstance(value, str | bytes):
        raise TypeError("text")
    if isinstance(value, int | float):
        return float(value)
    return float(np.asarray(value).item())


def to_step(step: Any) -> int:
    """Return a step as an int; None is 0, as in MLflow.

    Raises:
        TrackingError: if it is not an integer of 64 bits.
    """
    return 0 if step is None else _to_int64("step", step)


def to_timestamp(timestamp: Any) -> int | None:
    """Return milliseconds since the epoch as an int; None stays.

    Raises:
        TrackingError: if they are not a number of 64 bits; a fraction of one is left out.
    """
    if isinstance(timestamp, float | np.floating) and math.isfinite(timestamp):
        timestamp = int(timestamp)
    return None if timestamp is None else _to_int64("timestamp", timestamp)


def to_text(value: Any) -> str:
    """Return `str(value)`, with escapes for what UTF-8 cannot hold, as in some names of files."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _to_int64(name: str, value: Any) -> int:
    number: int | None = None
    try:
        number = operator.index(value)
    except TypeError:
        if isinstance(value, float | np.floating) and float(value).is_integer():
            number = int(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise TrackingError(
            f"{name}: expected an integer of 64 bits, got {str(value)[:40]!r}"
            f" ({type(value).__name__})"
        )
    return number
