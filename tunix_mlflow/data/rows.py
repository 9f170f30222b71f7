"""The rows of a file of any kind, one after the other, in bounded memory.

    jsonl    a JSON object a line
    json     JSON objects over several lines, one after the other or in one array
    csv, tsv cells under a header
    parquet, arrow
    text     a text a line

All but Parquet and Arrow may be compressed, and in another encoding than UTF-8.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tunix_mlflow.data.sources import Source
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.files import one_line

_CHUNK = 1 << 20
_STRUCTURE = re.compile(rb'["{}\[\]]')
# Possessive: one that does not end is not tried again, which would take memory for each character.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BETWEEN = re.compile(rb"[\s,\[\]]*")
_DELIMITERS = ",;\t|"


def lines(source: Source, longest: int, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield every line of a JSONL file, with its line end, in order.

    Args:
        source: the file.
        longest: maximum bytes of a line; of a longer one only the first `longest` + 2 bytes
            are yielded.
        start: skip lines that begin before this byte; of a file that is not compressed.
        end: stop before a line that begins at or after this one; None: at the end.

    Raises:
        DatasetError: if the file cannot be read.
    """
    most = longest + 2  # with the line end
    position = start
    with _failures(source), open_bytes(source) as handle:
        if start:
            handle.seek(start - 1)
            position -= 1
            while line := handle.readline(most):  # the rest of the line before
                position += len(line)
                if line.endswith(b"\n"):
                    break
        while (end is None or position < end) and (line := handle.readline(most)):
            position += len(line)
            yield line
            while len(line) == most and not line.endswith(b"\n"):  # the rest of one too long
                line = handle.readline(most)
                position += len(line)


def rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file in order, each with its number from 1; of a table, with its line.

    A row is a record, or the bytes of a JSON object.

    Args:
        source: the file.
        longest: maximum bytes of a row of JSON; of a longer one only the beginning is yielded.

    Raises:
        DatasetError: if the file cannot be read.
    """
    number = 0
    with _failures(source, lambda: number):
        for number, row in _READERS[source.kind](source, longest):
            yield number, row


@contextlib.contextmanager
def _failures(source: Source, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn what goes wrong with a file into a DatasetError."""
    try:
        yield
    except UnicodeError as error:
        where = f"{source.path}:{done() + 1}" if done() else str(source.path)
        raise DatasetError(f"{where}: {not_utf8(error)}") from error
    except (OSError, EOFError, pa.ArrowException, ValueError, lzma.LZMAError) as error:
        where = f"{source.path} after row {done()}" if done() else str(source.path)
        raise DatasetError(f"cannot read {where}: {one_line(error, 300)}") from error


def with_layout(source: Source) -> Source:
    """Return a file of JSON as `jsonl` or as `json`, by how it begins.

    Raises:
        DatasetError: if it cannot be read.
    """
    if source.kind != "jsonl":
        return source
    try:
        with open_bytes(source) as handle:
            begun = handle.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, UnicodeError, pa.ArrowException, lzma.LZMAError) as error:
        raise DatasetError(f"cannot read {source.path}: {one_line(error, 300)}") from error
    return source if _has_lines(begun) else source._replace(kind="json")


def _has_lines(begun: bytes) -> bool:
    """Return whether JSON that begins like this has an object a line."""
    if not begun.startswith(b"{"):
        return not begun.startswith(b"[")
    line, newline, _ = begun.partition(b"\n")
    # A pretty-printed object is not whole at the end of its first line.
    return not newline or _object_end(line, 0) is not None


def first(source: Source, longest: int) -> dict[str, Any]:
    """Return the first row that can be read and is not empty; an empty one if there is none."""
    for _, tree in itertools.islice(rows(source, longest), 100):
        if isinstance(tree, bytes):
            with contextlib.suppress(ValueError, RecursionError):
                tree = json.loads(tree.removeprefix(codecs.BOM_UTF8))
        if isinstance(tree, dict) and tree:
            return tree
    return {}


def not_utf8(error: UnicodeError) -> str:
    """Return a line on text that is in another encoding."""
    what = "the text cannot be decoded"
    if isinstance(error, UnicodeDecodeError):
        what = f"byte 0x{error.object[error.start]:02x} is not {error.encoding.upper()}"
    return f"{what}; name the encoding, for example --encoding latin-1 or utf-16"


def open_bytes(source: Source) -> IO[bytes]:
    """Open a file, unzipped and in UTF-8."""
    raw = _unzipped(source)
    if source.encoding is None:
        return raw
    return cast("IO[bytes]", codecs.EncodedFile(raw, "utf-8", source.encoding))


def _unzipped(source: Source) -> IO[bytes]:
    if source.codec is None:
        return source.path.open("rb", buffering=_CHUNK)
    if source.codec == "zst":
        stream: Any = pa.input_stream(str(source.path), compression="zstd")
        return cast("IO[bytes]", io.BufferedReader(stream))
    opened: Any = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[source.codec]
    return cast("IO[bytes]", opened(source.path, "rb"))


def _line_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    return enumerate(lines(source, longest), start=1)


def _object_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    """Yield the objects of an array, or those that follow each other."""
    with open_bytes(source) as handle:
        buffer, number, closed = b"", 0, False
        while True:
            chunk = handle.read(_CHUNK)
            buffer = buffer + chunk if number else (buffer + chunk).removeprefix(codecs.BOM_UTF8)
            place = 0
            while True:
                between = _BETWEEN.match(buffer, place)
                assert between is not None
                place = between.end()
                if place == len(buffer):
                    break
                if buffer[place : place + 1] != b"{":
                    # Not an object: the parser says what is wrong with it.
                    stop = _value_end(buffer, place)
                else:
                    stop = _object_end(buffer, place)
                if stop is None:
                    if len(buffer) - place > longest or not chunk:
                        number += 1
                        yield number, buffer[place : place + longest + 2]
                        closed = True
                    break
                number += 1
                yield number, buffer[place:stop]
                place = stop
            if closed or not chunk:
                return
            buffer = buffer[place:]


def _object_end(buffer: bytes, start: int) -> int | None:
    """Return where an object ends; None: not in this buffer."""
    depth, place = 0, start
    while (found := _STRUCTURE.search(buffer, place)) is not None:
        place = found.end()
        if found[0] == b'"':
            string = _STRING.match(buffer, found.start())
            if string is None:
                return None
            place = string.end()
            continue
        depth += _depth(found[0])
        if depth == 0:
            return place
    return None


def _value_end(buffer: bytes, start: int) -> int | None:
    if buffer[start : start + 1] == b'"':
        string = _STRING.match(buffer, start)
        return None if string is None else string.end()
    found = re.compile(rb"[,\]\s{]").search(buffer, start + 1)
    return None if found is None else found.start()


def _depth(character: bytes) -> int:
    return 1 if character in b"{[" else -1 if character in b"}]" else 0


def _cell_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a table as records; an empty cell is null."""
    size = 0  # characters of the row that is being read

    def bounded(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal size
        while line := text.readline(longest + 2):
            size += len(line)
            if size > longest:
                raise ValueError(
                    f"a row is longer than {longest} characters, or a quote is not closed; see"
                    " --set limits.body_bytes"
                )
            yield line

    limit = csv.field_size_limit(longest)
    try:
        encoding = source.encoding or "utf-8-sig"
        with io.TextIOWrapper(_unzipped(source), encoding, newline="") as text:
            table = bounded(text)
            begun_with = next(table, "")
            delimiter = "\t" if source.kind == "tsv" else _delimiter(begun_with)
            cells = csv.reader(
                itertools.chain([begun_with], table), delimiter=delimiter, strict=True
            )
            header = next(cells, [])
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise ValueError(f"two columns are called {twice!r}")
            line = cells.line_num
            for row in cells:
                begun, line, size = line + 1, cells.line_num, 0
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"line {begun} has {len(row)} cells, and the header {len(header)}"
                    )
                record = {name: cell or None for name, cell in zip(header, row, strict=True)}
                yield begun, record
    except csv.Error as error:
        raise ValueError(f"line {cells.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str) -> str:
    """Return what separates the names of a header: the most frequent of the usual ones."""
    return max(_DELIMITERS, key=header.count)


def _text_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines(source, longest), start=1):
        if not line.isspace():
            text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip("\r\n")
            yield number, {"text": text}


def _parquet_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(source.path) as file:
        yield from _numbered(file.iter_batches(batch_size=2_000))


def _arrow_rows(source: Source, longest: int) -> Iterator[tuple[int, Any]]:
    with pa.OSFile(str(source.path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(file)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            yield from _numbered(batches)
            return
        yield from _numbered(stream)


def _numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Any]]:
    return enumerate((r for batch in batches for r in _records(batch)), start=1)


def _records(batch: pa.RecordBatch) -> list[Any]:
    # Looking for maps takes as long as all the rest.
    maps = "strict" if any(_has_map(field.type) for field in batch.schema) else None
    records: list[Any] = batch.to_pylist(maps_as_pydicts=maps)
    return records


def _has_map(kind: pa.DataType) -> bool:
    if pa.types.is_map(kind):
        return True
    return any(_has_map(kind.field(i).type) for i in range(kind.num_fields))


_READERS = {
    "jsonl": _line_rows,
    "json": _object_rows,
    "csv": _cell_rows,
    "tsv": _cell_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
