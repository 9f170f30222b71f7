"""Tables for a terminal, which show every value in full however narrow it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

import click

from tunix_mlflow.runtime.report import printable


def echo(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stdout; see :func:`render`."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(render(headers, rows, width))


def render(
    headers: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None
) -> str:
    """Return rows below their headers, or, where they do not fit, one line for each value.

    Nothing is cut: keys and ids are there to be copied.

    Args:
        headers: one for each column.
        rows: values; None is shown as nothing, integers with separators, columns of numbers to the
            right. Control characters are escaped.
        width: columns of the terminal; None: unlimited.
    """
    table = [list(row) for row in rows]
    cells = [[_cell(value) for value in row] for row in table]
    sizes = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    if width is not None and sum(sizes) + 2 * (len(sizes) - 1) > width and cells:
        return "\n\n".join(_record(headers, row) for row in cells)
    right = [all(_is_number(row[i]) for row in table) for i in range(len(headers))]
    lines = [
        "  ".join(
            text.rjust(size) if to_right else text.ljust(size)
            for text, size, to_right in zip(row, sizes, right, strict=True)
        ).rstrip()
        for row in [list(headers), *cells]
    ]
    return "\n".join(lines)


def _record(headers: Sequence[str], row: Sequence[str]) -> str:
    size = max(map(len, headers))
    return "\n".join(f"{h.ljust(size)}  {c}".rstrip() for h, c in zip(headers, row, strict=True))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.10g}" if isinstance(value, float) else printable(str(value))


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
