"""Write a dataset to a file."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Raw

from tunix_mlflow import paths
from tunix_mlflow.data import canonical, writers
from tunix_mlflow.data.catalog import read
from tunix_mlflow.data.catalog.digests import find_corrupted
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError, IntegrityError
from tunix_mlflow.files import failure, one_line, remove_parts, replacing


def export(manifest: Manifest, path: Path, form: str) -> int:
    """Write a dataset in order of ingest. The file appears complete or not at all.

    Args:
        manifest: of the dataset.
        path: ends in .jsonl, .jsonl.gz or .parquet.
        form: one of writers.EXPORTS.

    Returns:
        The number of examples.

    Raises:
        DatasetError: if the file cannot be written, or an example does not fit the form.
        IntegrityError: if an example does not match its digest.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise DatasetError(f"{path}: the name has to end in .jsonl, .jsonl.gz or .parquet")
    if form not in writers.EXPORTS:
        raise DatasetError(f"no format {form!r}; one of {', '.join(writers.EXPORTS)}")
    batches, record = read.stream(paths.catalog_path(), manifest.key), writers.writer(form)
    advice = f"see `tunix-mlflow datasets verify {manifest.key}`"
    count = 0
    with contextlib.closing(batches), writing(path) as part, _writer(part, path.name) as write:
        for batch in batches:
            if wrong := find_corrupted(batch):
                name = canonical.id_of(wrong[0])
                raise IntegrityError(f"{name} does not match its digest; {advice}")
            texts = batch["canonical"].cast(pa.binary()).to_pylist()
            splits = batch["split"].to_pylist()
            write([record(t, s) for t, s in zip(texts, splits, strict=True)])
            count += len(texts)
        if count != manifest.count:
            raise IntegrityError(f"dataset {manifest.key} is damaged; {advice}")
    return count


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path as :func:`files.replacing`.

    Raises:
        DatasetError: if the file cannot be written.
    """
    try:
        remove_parts(path)
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise failure(error, f"cannot write {path}", DatasetError) from error


@contextlib.contextmanager
def _writer(part: Path, name: str) -> Iterator[Callable[[list[Any]], None]]:
    if name.endswith(".parquet"):
        rows: list[Any] = []
        yield rows.extend
        try:
            columns = [_columns(row) for row in rows]
            # A table takes its columns from the first row.
            names = dict.fromkeys(key for row in columns for key in row)
            table = pa.Table.from_pylist([dict.fromkeys(names) | row for row in columns])
        except pa.ArrowException as error:
            raise DatasetError(
                f"these examples have no common columns, write .jsonl: {one_line(error)}"
            ) from error
        pq.write_table(table, part, compression="zstd")
        return
    encoder = msgspec.json.Encoder()
    pending: Future[Any] | None = None

    def write(records: list[Any]) -> None:
        nonlocal pending
        data = encoder.encode_lines(records)
        if pending is not None:
            pending.result()
        pending = pool.submit(out.write, data)  # while the next records are encoded

    with (
        gzip.open(part, "wb") if name.endswith(".gz") else part.open("wb") as out,
        ThreadPoolExecutor(1) as pool,
    ):
        yield write
        if pending is not None:
            pending.result()


def _columns(record: Any) -> dict[str, Any]:
    """Return a row for Parquet, which has no empty struct.

    Calls and tools are JSON text there: columns would reorder their keys and add nulls.
    """
    plain = _as_text(record) if isinstance(record, dict) else record
    row: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(plain))
    return {key: value for key, value in row.items() if value != {}}


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return bytes(value).decode() if isinstance(value, Raw) else value
