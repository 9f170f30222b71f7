"""Snapshots: a dataset as a Parquet file, named by its digest and checked when read.

Training reads snapshots only, so it never holds the catalog open.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunix_mlflow import state
from tunix_mlflow.data import canonical
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog import SNAPSHOT_SCHEMA
from tunix_mlflow.data.examples import Example, from_canonical
from tunix_mlflow.data.manifest import Manifest, Member
from tunix_mlflow.errors import DatasetError, IntegrityError

FILE = "examples.parquet"


def path_of(digest: str) -> Path:
    """The Parquet file of the dataset with this digest.

    Raises:
        DatasetError: if it is not 64 hex digits; a digest may come from anywhere.
    """
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise DatasetError(f"{digest[:80]!r} is not a dataset digest: expected 64 hex digits")
    return state.snapshot_dir(digest) / FILE


def write(manifest: Manifest, table: pa.Table) -> Path:
    """Write the snapshot, once per digest: a folder appears whole or not at all.

    Raises:
        DatasetError: if the snapshot root cannot be written to.
    """
    file = path_of(manifest.digest)
    if file.is_file():
        return file
    try:
        file.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent.parent, prefix=".making-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            pq.write_table(table, made / FILE, compression="zstd")
            if file.parent.exists() and not file.is_file():
                shutil.rmtree(file.parent)  # somebody emptied it
            try:
                made.rename(file.parent)
            except OSError:
                if not file.is_file():  # else another process was first
                    raise
    except OSError as error:
        raise DatasetError(f"cannot write the snapshot {file}: {error.strerror}") from error
    return file


def members(digest: str) -> list[Member] | None:
    """Digests and splits of a snapshot whose digest is right; None if there is none."""
    try:
        table = pq.read_table(path_of(digest), columns=["digest", "split"])
    except (OSError, pa.ArrowException):
        return None
    found = [
        Member(d, s)
        for d, s in zip(table["digest"].to_pylist(), table["split"].to_pylist(), strict=True)
    ]
    return found if manifests.dataset_digest(found) == digest else None


def read(digest: str, split: str | None = None) -> list[Example]:
    """The examples, sorted by digest, after every one was checked against its digest.

    Args:
        digest: the dataset's.
        split: only this split; None for all.

    Raises:
        DatasetError: if there is no such snapshot.
        IntegrityError: if its content is not what the digest says.
    """
    path = path_of(digest)
    try:
        table = pq.read_table(path, schema=SNAPSHOT_SCHEMA)
    except FileNotFoundError as error:
        raise DatasetError(
            f"there is no snapshot {path}; run `tunix-mlflow datasets verify KEY` where the"
            " catalog is"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"the snapshot {path} cannot be read: {error}; delete it") from error
    digests, splits, texts = (table[name].to_pylist() for name in SNAPSHOT_SCHEMA.names)
    found = [Member(d, s) for d, s in zip(digests, splits, strict=True)]
    wrong = [
        d
        for d, text in zip(digests, texts, strict=True)
        if canonical.digest(text.encode("utf-8")) != d
    ]
    if wrong or manifests.dataset_digest(found) != digest:
        named = f" ({canonical.id_of(wrong[0])} changed)" if wrong else ""
        raise IntegrityError(f"the snapshot {path} is damaged{named}; delete its folder")
    return [
        from_canonical(text)
        for text, s in zip(texts, splits, strict=True)
        if split is None or s == split
    ]
