"""The rows of a request to a served model, in any form that MLflow passes on.

A row is a prompt, messages, or an object with one of `prompt`, `text` and `messages`, and with
`system` and `tools`; other keys are not read. Requests are frames, series, arrays, lists, texts,
and objects of columns; each row of one gives an example, or says why not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tunix_mlflow.errors import DatasetError

if TYPE_CHECKING:
    from tunix_mlflow.data.examples import Example

_PROMPTS = ("prompt", "text")
_EXPECTED = "a row is a prompt, or has one of `prompt`, `text` and `messages`"


def examples(data: Any) -> list[Example | str]:
    """Return for each row of a request an example without an answer, or what is wrong with it."""
    return [_example(row) for row in _rows(data)]


def _rows(data: Any) -> list[Any]:
    if isinstance(data, pd.DataFrame):
        if len(data.columns) == 1 and not isinstance(data.columns[0], str):
            return _rows(data.iloc[:, 0])  # a list, which MLflow made a frame of
        return [dict(zip(data.columns, row, strict=True)) for row in data.itertuples(index=False)]
    if isinstance(data, pd.Series):
        return list(data.tolist())
    if isinstance(data, np.ndarray):
        return _rows(data.tolist())
    if isinstance(data, Mapping):
        return _of_columns({key: _plain(value) for key, value in data.items()})
    if isinstance(data, str | bytes) or not isinstance(data, Sequence):
        return [data]
    return [data] if _is_conversation(data) else list(data)


def _of_columns(columns: dict[str, Any]) -> list[Any]:
    """Return the rows of an object: one, or as many as its columns are long."""
    lists = {
        key: value
        for key, value in columns.items()
        if isinstance(value, list) and not _is_conversation(value) and not _are_tools(key, value)
    }
    if not lists:
        return [columns]
    count = max(len(value) for value in lists.values())
    rows = []
    for number in range(count):
        own = {key: value[number] for key, value in lists.items() if number < len(value)}
        rows.append({k: v for k, v in columns.items() if k not in lists} | own)
    return rows


def _example(row: Any) -> Example | str:
    from tunix_mlflow.models import bundle as bundles

    row = _plain(row)
    if isinstance(row, list) and len(row) == 1 and isinstance(row[0], str):
        row = row[0]  # of an array with one column
    if isinstance(row, str):
        row = {"prompt": row}
    elif isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        return _EXPECTED
    given = {key: value for key, value in row.items() if not _is_missing(value)}
    asked = [key for key in (*_PROMPTS, "messages") if key in given]
    if len(asked) != 1:
        return _EXPECTED if not asked else f"a row has {' and '.join(asked)}; give one of them"
    turns = given[asked[0]]
    if asked[0] != "messages":
        if not isinstance(turns, str) or not turns:
            return _EXPECTED
        turns = [{"role": "user", "content": turns}]
    try:
        return bundles.conversation(turns, given.get("tools"), given.get("system"))
    except DatasetError as error:
        return str(error)


def _plain(value: Any) -> Any:
    """Return arrays as lists, at every depth."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _is_conversation(value: Sequence[Any]) -> bool:
    return bool(value) and all(
        isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value
    )


def _are_tools(key: str, value: Sequence[Any]) -> bool:
    """Whether a value is the definitions of one row, not a column of them."""
    return key == "tools" and all(isinstance(item, Mapping) for item in value)
