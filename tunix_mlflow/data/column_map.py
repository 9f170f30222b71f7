"""Fields of a form from the columns of a file: by another name, from inside, or joined.

prompt=question                       the column `question`
prompt=data.question                  the key `question` in the column `data`
prompt={instruction}\\n\\n{input}      both, with an empty line between them
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PLACE = re.compile(r"\{([^{}]+)\}")
_ESCAPES = {"\\n": "\n", "\\t": "\t"}


def columns_of(spec: str, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns that the right side of a mapping reads.

    Args:
        spec: a column, a path into one, or a text with such in braces.
        columns: of the file.
    """
    paths = _PLACE.findall(spec) if "{" in spec else [spec]
    return [path if path in columns else path.partition(".")[0] for path in paths]


def apply(mapping: Mapping[str, str], row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the fields of a mapping in place of the columns they are made of.

    Args:
        mapping: field -> right side.
        row: column -> value; nulls are absent.

    Raises:
        ValueError: if a joined value is not a text or a number.
    """
    if not mapping:
        return row
    made = {field: _value(spec, row) for field, spec in mapping.items()}
    used = {column for spec in mapping.values() for column in columns_of(spec, row)}
    rest = {column: value for column, value in row.items() if column not in used}
    return rest | {field: value for field, value in made.items() if value is not None}


def _value(spec: str, row: Mapping[str, Any]) -> Any:
    if "{" not in spec:
        return _at(spec, row)

    def text(place: re.Match[str]) -> str:
        value = _at(place[1], row)
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"only texts and numbers can be joined - at `$.{place[1]}`")
        return "" if value is None else str(value)

    for escaped, character in _ESCAPES.items():
        spec = spec.replace(escaped, character)
    return _PLACE.sub(text, spec).strip()


def _at(path: str, row: Mapping[str, Any]) -> Any:
    """Return the value of a column, or of a key or an index inside one; None: there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
