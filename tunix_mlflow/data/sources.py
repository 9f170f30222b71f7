"""The files that a dataset is ingested from: JSONL, JSONL.gz, Parquet, text, and folders of them.

A folder may be one that Hugging Face `datasets` saved, or have one or more files per split.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tunix_mlflow.errors import DatasetError
from tunix_mlflow.files import one_line

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
KINDS |= {".txt": "text", ".arrow": "arrow"}
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}


class Source(NamedTuple):
    """One file, how it is read, and its split."""

    path: Path
    kind: str  # jsonl, parquet, text or arrow
    zipped: bool
    split: str | None


def find_sources(named: Sequence[str]) -> list[Source]:
    """Return the files that `PATH` or `SPLIT=PATH` arguments name, with those of folders.

    Several files, or those of a folder, get their splits from their names; a single file does not.

    Raises:
        DatasetError: for a file that does not exist or is of no known kind.
    """
    result: list[Source] = []
    single = len(named) == 1
    for word in named:
        path, split = Path(word), None
        match = re.fullmatch(r"([a-z][a-z0-9_-]{0,31})=(.+)", word)
        if match and not path.exists():
            split, path = match[1], Path(match[2])
        try:
            if path.is_dir():
                result += _folder(path, split)
            else:
                given = split or (None if single else _split_of(path.name))
                result.append(_source(path, given))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"cannot read {str(path)[:200]!r}: {one_line(error, 300)}"
            ) from error
    return result


def size(source: Source) -> int:
    """Return the bytes on the disk, for progress."""
    return source.path.stat().st_size


def columns(source: Source, longest: int) -> dict[str, bool]:
    """Return column -> whether it has a value, of the first row that can be read."""
    trees: Iterable[Any]
    if source.kind == "jsonl":
        trees = (_tree(line) for line in lines(source, longest))
    else:
        trees = (record for _, record in records(source, longest))
    for tree in itertools.islice(trees, 100):
        if isinstance(tree, dict) and tree:
            return {name: value is not None for name, value in tree.items()}
    return {}


def _tree(line: bytes) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def lines(source: Source, longest: int, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield every line of a JSONL file, with its line end, in order.

    Args:
        source: the file.
        longest: maximum bytes of a line; of a longer one only the first `longest` + 2 bytes
            are yielded.
        start: skip lines that begin before this byte.
        end: stop before a line that begins at or after this one; None: at the end.

    Raises:
        DatasetError: if the file cannot be read.
    """
    try:
        with _open(source) as handle:
            yield from _lines(handle, longest, start, end)
    except (OSError, EOFError) as error:
        raise DatasetError(f"cannot read {source.path}: {one_line(error, 300)}") from error


def records(source: Source, longest: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of a file of another kind, with its number from 1, in order.

    Raises:
        DatasetError: if the file cannot be read.
    """
    number = 0
    try:
        if source.kind == "text":
            with _open(source) as handle:
                for number, line in enumerate(_lines(handle, longest, 0, None), start=1):
                    if line.strip():
                        yield number, {"text": line.decode("utf-8").rstrip("\r\n")}
        else:
            for batch in _batches(source):
                for record in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, record
    except UnicodeDecodeError as error:
        raise DatasetError(f"{source.path}:{number}: not UTF-8: {error.reason}") from error
    except (OSError, EOFError, pa.ArrowException, ValueError) as error:
        raise DatasetError(f"cannot read {source.path}: {one_line(error, 300)}") from error


def _open(source: Source) -> IO[bytes]:
    if source.zipped:
        return cast("IO[bytes]", gzip.GzipFile(source.path, "rb"))
    return source.path.open("rb", buffering=1 << 20)


def _lines(handle: IO[bytes], longest: int, start: int, end: int | None) -> Iterator[bytes]:
    most = longest + 2  # with the line end
    position = start
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


def _batches(source: Source) -> Iterator[pa.RecordBatch]:
    if source.kind == "parquet":
        with pq.ParquetFile(source.path) as file:
            yield from file.iter_batches(batch_size=2_000)
        return
    with pa.OSFile(str(source.path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(file)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
            return
        yield from stream


def _folder(path: Path, split: str | None) -> list[Source]:
    listed = path / "dataset_dict.json"
    if listed.is_file():  # datasets.DatasetDict.save_to_disk
        names = json.loads(listed.read_text(encoding="utf-8"))["splits"]
        checked = [_checked_name(name) for name in names]
        return [s for name in checked for s in _folder(path / name, split or name)]
    if (path / "state.json").is_file():  # datasets.Dataset.save_to_disk
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        named = [_checked_name(file["filename"]) for file in state["_data_files"]]
        return [_source(path / name, split) for name in named]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _kind(file) is not None and not file.name.startswith(".")
        if file.name not in ("dataset_info.json", "dataset_infos.json")
    ]
    if not files:
        raise ValueError("the folder has no JSONL, Parquet, Arrow or text file")
    return [
        _source(file, split or _split_of(file.name) or _split_of(file.parent.name))
        for file in files
    ]


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name) or ".." in name:
        raise ValueError(f"the folder names a file or split {name!r}, which is not allowed")
    return name


def _source(path: Path, split: str | None) -> Source:
    kind = _kind(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory")
    if kind is None:
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"unknown kind of file; expected {known}, or one of them with .gz")
    return Source(path, kind, path.suffix == ".gz", split)


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if path.suffix == ".gz":
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return kind if kind in ("jsonl", "text") else None
    return KINDS.get(path.suffix)


def _split_of(name: str) -> str | None:
    """Return the split in a file name, which is its first or last word: train-00000-of-00001."""
    words = re.split(r"[^a-z]+", re.sub(r"-\d+-of-\d+", "", name.lower()).partition(".")[0])
    return _SPLITS.get(words[0]) or _SPLITS.get(words[-1])
