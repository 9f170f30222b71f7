"""Digests of what a catalog holds, computed over columns without a Python object per row."""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunix_mlflow.data import canonical
from tunix_mlflow.data.manifest import Split


class Digests(NamedTuple):
    """The digests of a set of members."""

    content: str  # of the members alone
    dataset: str  # of the members and the splits they are in
    splits: dict[str, Split]


def digests_of(con: duckdb.DuckDBPyConnection, table: str) -> Digests:
    """Return every digest of a table with columns digest and split, by one sorted pass.

    Each is `canonical.set_digest` of its lines.
    """
    counts = dict(
        con.execute(f"SELECT split, count(*) FROM {table} GROUP BY 1 ORDER BY 1").fetchall()
    )
    count = sum(counts.values())
    content = canonical.set_hasher("tunix-source-v1", count)
    dataset = canonical.set_hasher("tunix-dataset-v1", count)
    splits = {name: canonical.set_hasher("tunix-split-v1", n) for name, n in counts.items()}
    lines = con.sql(
        f"""SELECT split, digest || chr(10) AS own, digest || ':' || split || chr(10) AS line
            FROM (SELECT digest, split FROM {table} ORDER BY digest, split)"""
    )
    for batch in lines.to_arrow_reader(100_000):
        dataset.update(_joined(batch["line"]))
        content.update(_joined(batch["own"]))
        for name, hasher in splits.items():
            inside = pc.equal(batch["split"], name)
            hasher.update(_joined(batch["own"].filter(inside)))
    return Digests(
        content.hexdigest(),
        dataset.hexdigest(),
        {name: Split(count=n, digest=splits[name].hexdigest()) for name, n in counts.items()},
    )


def find_corrupted(batch: pa.RecordBatch) -> list[str]:
    """Return the digests of the examples whose canonical text does not have that digest.

    Args:
        batch: columns digest and canonical.
    """
    texts, ends = _text_buffer(batch["canonical"])
    # hashlib uses the processor's SHA instructions, DuckDB's sha256 does not.
    sums = [hashlib.sha256(texts[a:b]).digest() for a, b in itertools.pairwise(ends)]
    if bytes(_joined(batch["digest"])) == b"".join(sums).hex().encode():
        return []
    names = batch["digest"].to_pylist()
    return [name for name, own in zip(names, sums, strict=True) if name != own.hex()]


def _joined(column: pa.StringArray) -> memoryview:
    """Return the texts of a column as one block of bytes."""
    data, ends = _text_buffer(column)
    return data[ends[0] : ends[-1]]


def _text_buffer(column: pa.StringArray) -> tuple[memoryview, list[int]]:
    """Return the bytes of a column's texts, the start of each, and the end of the last."""
    if not len(column):
        return memoryview(b""), [0]
    _, offsets, data = column.cast(pa.string()).buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return memoryview(data), ends.tolist()
