"""The filters of a selection as SQL. Values are always bound, never written into the text."""

from __future__ import annotations

from typing import Any

from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.manifest import Selection

_SYMBOLS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def where(selection: Selection) -> tuple[str, list[Any]]:
    """Return a WHERE clause and its parameters.

    A value is compared with values of its own type only.

    Raises:
        DatasetError: for a filter that is not plain.
    """
    clauses: list[str] = []
    params: list[Any] = []
    for key, operator, value in manifests.conditions(selection):
        json_path = f'$."{key}"'
        if operator in _SYMBOLS:
            sql, bound = _comparison(json_path, _SYMBOLS[operator], value)
        else:
            values = value if isinstance(value, list) else [value]
            each = [_comparison(json_path, "=", v) for v in values]
            sql = "(" + " OR ".join(s for s, _ in each) + ")"
            bound = [b for _, many in each for b in many]
        if operator in ("ne", "not_in"):
            sql = f"NOT coalesce({sql}, false)"  # an absent key is not equal
        clauses.append(sql)
        params += bound
    return ("WHERE " + " AND ".join(clauses) if clauses else ""), params


def _comparison(json_path: str, symbol: str, value: Any) -> tuple[str, list[Any]]:
    text = "json_extract_string(meta, ?)"
    paths = [json_path, json_path]
    if isinstance(value, bool):
        sql = f"(json_type(meta, ?) = 'BOOLEAN' AND {text} {symbol} ?)"
        return sql, [*paths, "true" if value else "false"]
    if isinstance(value, str):
        return f"(json_type(meta, ?) = 'VARCHAR' AND {text} {symbol} ?)", [*paths, value]
    kinds = "('UBIGINT', 'BIGINT', 'DOUBLE')"
    sql = f"(json_type(meta, ?) IN {kinds} AND TRY_CAST({text} AS DOUBLE) {symbol} ?::DOUBLE)"
    return sql, [*paths, float(value)]
