"""How the arguments of `tunix-mlflow datasets` are read: conditions, shares, KEY=VALUE pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_OPERATORS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
_OPERATORS |= {":": "in", "!:": "not_in"}


def filters(conditions: Iterable[str]) -> dict[str, Any]:
    """Return the filters of a selection: meta key -> operator -> value.

    Args:
        conditions: `key=value`, or another operator; a value is JSON if it can be read as such.

    Raises:
        DatasetError: for a condition without an operator, or given twice.
    """
    from tunix_mlflow.errors import DatasetError

    result: dict[str, Any] = {}
    for text in conditions:
        match = re.fullmatch(r"(.*?)(!=|!:|>=|<=|=|>|<|:)(.*)", text, re.DOTALL)
        if match is None:
            raise DatasetError(f"--where {text!r}: expected KEY=VALUE, or !=, <, <=, >, >=, :, !:")
        key, symbol, rest = match.groups()
        values = [_value(part) for part in rest.split(",")] if ":" in symbol else _value(rest)
        operators = result.setdefault(key, {})
        if _OPERATORS[symbol] in operators:
            raise DatasetError(f"--where {text!r}: {key}{symbol} is given twice")
        operators[_OPERATORS[symbol]] = values
    # The short form of equality is the manifest's.
    return {k: v["eq"] if list(v) == ["eq"] else v for k, v in result.items()}


def shares(texts: Iterable[str]) -> dict[str, float]:
    """Return split -> share of the prompts.

    Raises:
        DatasetError: for a text that is not NAME=SHARE.
    """
    from tunix_mlflow.errors import DatasetError

    result: dict[str, float] = {}
    for name, text in pairs(texts, "--split"):
        try:
            result[name] = float(text)
        except ValueError:
            raise DatasetError(f"--split {name}={text}: expected NAME=SHARE, 0 to 1") from None
    return result


def pairs(texts: Iterable[str], option: str) -> list[tuple[str, str]]:
    """Return (key, value) of each KEY=VALUE.

    Raises:
        DatasetError: naming the option and the text.
    """
    from tunix_mlflow.errors import DatasetError

    result: list[tuple[str, str]] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise DatasetError(f"{option} {text!r}: expected KEY=VALUE")
        result.append((key, value))
    return result


def _value(text: str) -> Any:
    from tunix_mlflow.data import canonical

    try:
        return canonical.decode(text)
    except ValueError:
        return text
