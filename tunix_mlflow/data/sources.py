"""The files that a dataset is ingested from, and the folders of them.

A folder may be one that Hugging Face `datasets` saved, or have one or more files per split.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.errors import DatasetError
from tunix_mlflow.files import one_line

KINDS = {
    **{".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"},
    **{".csv": "csv", ".tsv": "tsv", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"},
}
CODECS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
_COLUMNAR = ("parquet", "arrow")
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
    kind: str  # a value of KINDS, or json: objects over several lines; see rows
    codec: str | None  # a value of CODECS; None: not compressed
    split: str | None
    encoding: str | None = None  # None: UTF-8


def find_sources(named: Sequence[str], encoding: str | None = None) -> list[Source]:
    """Return the files that `PATH` or `SPLIT=PATH` arguments name, with those of folders.

    Several files, or those of a folder, get their splits from their names; a single file does not.

    Args:
        named: the arguments.
        encoding: of text; None: UTF-8.

    Raises:
        DatasetError: for a file that does not exist or is of no known kind, or an encoding that
            is not known.
    """
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise DatasetError(f"no encoding {encoding!r}; for example utf-16 or latin-1") from None
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
    if encoding is None:
        return result
    return [s if s.kind in _COLUMNAR else s._replace(encoding=encoding) for s in result]


def size(source: Source) -> int:
    """Return the bytes on the disk, for progress."""
    return source.path.stat().st_size


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
        raise ValueError("the folder has no JSON, CSV, Parquet, Arrow or text file")
    return [
        _source(file, split or _split_of(file.name) or _split_of(file.parent.name))
        for file in files
    ]


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name) or ".." in name:
        raise ValueError(f"the folder names a file or split {name!r}, which is not allowed")
    return name


def _source(path: Path, split: str | None) -> Source:
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory")
    kind = _kind(path)
    if kind is None:
        known, packed = ", ".join(sorted(KINDS)), ", ".join(CODECS)
        raise ValueError(f"unknown kind of file; expected {known}, or one of them with {packed}")
    return Source(path, kind, CODECS.get(path.suffix), split)


def _kind(path: Path) -> str | None:
    """Return what kind of file a name says it is."""
    if path.suffix in CODECS:
        kind = KINDS.get(Path(path.stem).suffix)
        return None if kind in _COLUMNAR else kind
    return KINDS.get(path.suffix)


def _split_of(name: str) -> str | None:
    """Return the split in a file name, which is its first or last word: train-00000-of-00001."""
    words = re.split(r"[^a-z]+", re.sub(r"-\d+-of-\d+", "", name.lower()).partition(".")[0])
    return _SPLITS.get(words[0]) or _SPLITS.get(words[-1])
