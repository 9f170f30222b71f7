"""JSON as a row spells it: the order of keys, and the digits of numbers, are kept.

A template writes a call's arguments and the definitions of tools as they are, so the text that is
trained on depends on both. Canonical JSON, which sorts and rounds, would change it.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
from msgspec import Raw

from tunix_mlflow.data import canonical

_DEPTH = 100


class _Integer(int):
    text: str


class _Float(float):
    text: str


def parse(text: str | bytes) -> Any:
    """Parse strict JSON; a number remembers how it is spelled.

    Raises:
        ValueError: if it is not strict JSON.
    """
    return canonical.decode(text, parse_int=_integer, parse_float=_float)


def encode(value: Any) -> str:
    """Return a plain JSON value as compact JSON, its keys in their own order.

    Numbers that :func:`parse` read are spelled as they were, others in their shortest form.

    Raises:
        ValueError: naming what has no JSON form.
    """
    try:
        return msgspec.json.encode(_spelled(value, 0)).decode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("lone surrogate") from error
    except TypeError as error:
        raise ValueError(str(error)) from error


def plain(text: str) -> Any:
    """Return the value of a text that :func:`encode` wrote."""
    return json.loads(text)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null, at every depth.

    Files with columns give each object the keys of every other row's.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _spelled(value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise ValueError(f"nested deeper than {_DEPTH}")
    if isinstance(value, _Integer | _Float):
        return Raw(value.text.encode())
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not JSON")
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("NUL character")
    if isinstance(value, dict):
        return {_spelled(k, depth): _spelled(item, depth + 1) for k, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item, depth + 1) for item in value]
    return value


def _integer(text: str) -> _Integer:
    number = _Integer(text)
    number.text = text
    return number


def _float(text: str) -> _Float:
    number = _Float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    number.text = text
    return number
