"""Read manifests and examples from the catalog."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from tunix_mlflow.data import canonical
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog.columns import PROMPT_TEXT
from tunix_mlflow.data.catalog.connection import connect
from tunix_mlflow.data.manifest import Manifest

_CHUNK = 20_000  # rows that a reader gets at a time


def find(path: Path, key: str) -> Manifest | None:
    """Return the manifest of a key, or None."""
    if not path.exists():
        return None
    with connect(path, write=False) as con:
        return find_in(con, key)


def find_in(con: duckdb.DuckDBPyConnection, key: str) -> Manifest | None:
    """Return the manifest of a key, or None, in an open catalog."""
    rows = con.execute("SELECT document FROM manifests WHERE key = ?", [key]).fetchall()
    return manifests.from_document(rows[0][0]) if rows else None


def listing(path: Path) -> list[tuple[Manifest, datetime]]:
    """Return all manifests with the time (UTC) they were built, oldest first."""
    if not path.exists():
        return []
    with connect(path, write=False) as con:
        rows = con.execute(
            "SELECT document, created_at FROM manifests ORDER BY created_at, key"
        ).fetchall()
    return [(manifests.from_document(text), created) for text, created in rows]


def provenance(path: Path, key: str) -> list[dict[str, Any]]:
    """Return what is known of the files that a dataset was ingested from."""
    with connect(path, write=False) as con:
        rows = con.execute("SELECT document FROM sources WHERE key = ?", [key]).fetchall()
    return [canonical.decode(text) for (text,) in rows]


def not_found(key: str, path: Path) -> str:
    """Return the message for an absent dataset, with the versions that are stored."""
    name = manifests.parse_key(key)[0]
    have = [m.key for m, _ in listing(path)]
    near = [k for k in have if k.startswith(f"{name}-")] or have
    listed = ", ".join(near) if near else "none"
    return (
        f"dataset {key!r} is not in {path}; datasets found: {listed}."
        " Run `tunix-mlflow datasets list`, or ingest it"
    )


def first(path: Path, key: str) -> str:
    """Return the canonical text of the first member of a dataset, which has one."""
    with connect(path, write=False) as con:
        ((text,),) = con.execute(
            """SELECT canonical FROM examples WHERE digest =
                   (SELECT digest FROM members WHERE key = ? ORDER BY position LIMIT 1) LIMIT 1""",
            [key],
        ).fetchall()
    return str(text)


def stream(
    path: Path, key: str, *, prompt_text: bool = False
) -> Generator[pa.RecordBatch, None, None]:
    """Yield digest, split, prompt_digest and canonical of every member, in order of ingest.

    With `prompt_text`, also that column: the text of the last user message. A few thousand rows
    at a time.
    """
    text = f"{PROMPT_TEXT} AS prompt_text," if prompt_text else ""
    with connect(path, write=False) as con:
        con.execute(
            """CREATE TEMP TABLE wanted AS SELECT e.seq, m.split
               FROM members m JOIN examples e USING (digest) WHERE m.key = ? ORDER BY e.seq""",
            [key],
        )
        ranges = con.execute(
            f"""SELECT min(seq), max(seq) FROM (
                  SELECT seq, (row_number() OVER (ORDER BY seq) - 1) // {_CHUNK} AS part
                  FROM wanted) GROUP BY part ORDER BY part"""
        ).fetchall()

        def read_range(low: int, high: int) -> pa.RecordBatch:
            table = con.sql(
                f"""SELECT e.seq, e.digest, w.split, e.prompt_digest, {text} e.canonical
                    FROM examples e JOIN wanted w USING (seq)
                    WHERE e.seq BETWEEN ? AND ? AND w.seq BETWEEN ? AND ?""",
                params=[low, high, low, high],
            ).to_arrow_table()
            (batch,) = table.combine_chunks().to_batches()
            return batch.take(pc.sort_indices(batch["seq"])).drop_columns("seq")

        # The next part is read while the caller works on this one.
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(read_range, *ranges[0]) if ranges else None
            for bounds in [*ranges[1:], None]:
                batch = pending.result() if pending else None
                pending = pool.submit(read_range, *bounds) if bounds else None
                if batch is not None:
                    yield batch


def texts(path: Path, digests: list[str]) -> dict[str, str]:
    """Return the canonical texts of some examples, by digest."""
    with connect(path, write=False) as con:
        rows = con.execute(
            "SELECT digest, canonical FROM examples WHERE digest IN (SELECT unnest(?))", [digests]
        ).fetchall()
    return dict(rows)
