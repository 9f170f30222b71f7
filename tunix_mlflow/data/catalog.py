"""The catalog: every SQL statement of the project.

One DuckDB file below the state root. It is opened for one operation at a time, under a
lock file of our own, and never while training. Nothing here opens the file as a file: that
would drop DuckDB's own lock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa
from filelock import FileLock, Timeout

from tunix_mlflow.data import canonical, migrations
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.examples import (
    Example,
    canonical_text,
    from_canonical,
    prompt_digest,
)
from tunix_mlflow.data.manifest import Manifest, Member, Selection
from tunix_mlflow.errors import DatasetError

WAIT_SECONDS = 60.0

SNAPSHOT_SCHEMA = pa.schema(
    [("digest", pa.string()), ("split", pa.string()), ("canonical", pa.string())]
)


class Row(NamedTuple):
    """An example as it is stored."""

    digest: str
    id: str
    prompt_digest: str
    split: str | None
    meta: str
    canonical: str


class Report(NamedTuple):
    """What `verify` found; digests by kind. All empty means: exactly what the manifest says."""

    missing: list[str]
    extra: list[str]
    changed: list[str]
    duplicated: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not any(self)

    def summary(self) -> str:
        """One line: kinds, counts and the first few names."""
        parts = []
        for kind in ("missing", "extra", "changed", "duplicated"):
            found: list[str] = getattr(self, kind)
            if found:
                names = ", ".join(canonical.id_of(d) for d in found[:3])
                parts.append(f"{len(found)} {kind} ({names}{', ...' if len(found) > 3 else ''})")
        return "; ".join(parts + self.notes) or "nothing"


def row_of(example: Example) -> Row:
    """The stored form.

    Raises:
        DatasetError: when the example has no canonical form.
    """
    try:
        text = canonical_text(example)
        digest = canonical.digest(text.encode("utf-8"))
        meta = canonical.encode(example.meta).decode()
        return Row(
            digest,
            canonical.id_of(digest),
            prompt_digest(example),
            example.split,
            meta,
            text,
        )
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"an example cannot be stored: {error}") from error


@contextmanager
def connect(path: Path, *, write: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for one operation.

    Raises:
        DatasetError: if the file is damaged, newer than this version, absent (for reading),
            or held by another process for longer than WAIT_SECONDS.
    """
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"cannot create {path.parent}: {error.strerror}") from error
    elif not path.exists():
        raise DatasetError(f"there is no catalog at {path} yet; seed or ingest a dataset first")
    try:
        lock = FileLock(f"{path}.lock", timeout=WAIT_SECONDS)
        with lock:
            con = _open(path, write)
            try:
                con.execute("SET enable_external_access=false")
                con.execute("SET lock_configuration=true")
                if write:
                    migrations.migrate(con, path)
                elif migrations.check(con, path):
                    raise DatasetError(
                        f"{path} is from an older version; seed or ingest upgrades it"
                    )
                yield con
            finally:
                con.close()
    except Timeout as error:
        raise DatasetError(
            f"another process has held {path} for {WAIT_SECONDS:.0f} s; wait for it or end it"
        ) from error
    except OSError as error:
        raise DatasetError(f"cannot use {path}: {error}") from error
    except duckdb.Error as error:
        raise DatasetError(f"{path} cannot be used: {_first_line(error)}") from error


def find(path: Path, key: str) -> Manifest | None:
    """The manifest of this key, or None."""
    if not path.exists():
        return None
    with connect(path, write=False) as con:
        return _find(con, key)


def listing(path: Path) -> list[tuple[Manifest, datetime]]:
    """All manifests with the time (UTC) they were built, oldest first."""
    if not path.exists():
        return []
    with connect(path, write=False) as con:
        rows = con.execute(
            "SELECT document, created_at FROM manifests ORDER BY created_at, key"
        ).fetchall()
    return [(manifests.from_document(text), created) for text, created in rows]


def store(path: Path, make: Manifest, members: Sequence[Member], rows: Iterable[Row] = ()) -> bool:
    """Store a manifest, its members and the examples that are new, in one transaction.

    Returns:
        False if that very manifest was already there, and nothing was changed.

    Raises:
        DatasetError: if the key names another dataset.
    """
    unique = {row.digest: row for row in rows}
    with connect(path, write=True) as con, _transaction(con):
        if _already(con, make):
            return False
        if unique:
            incoming = pa.table(
                {name: [getattr(row, name) for row in unique.values()] for name in Row._fields},
                schema=pa.schema([(name, pa.string()) for name in Row._fields]),
            )
            con.register("incoming", incoming)
            con.execute(
                """INSERT INTO examples (digest, id, prompt_digest, split, meta, canonical)
                   SELECT digest, id, prompt_digest, split, meta, canonical FROM incoming
                   WHERE digest NOT IN (SELECT digest FROM examples)"""
            )
            con.unregister("incoming")
        _insert(con, make, members)
        return True


def select(path: Path, selection: Selection) -> list[Row]:
    """The examples that a request means, in its order.

    Raises:
        DatasetError: for a filter that is not plain.
    """
    manifests.check_selection(selection)
    where, params = [], []
    for key, value in selection.filters.items():
        where.append("json_extract(meta, ?)::VARCHAR = ?")
        params += [f'$."{key}"', canonical.encode(value).decode()]
    order = "seq DESC"
    if selection.order == "random":
        order = "sha256(? || ':' || digest), digest"
        params.append(str(selection.seed))
    limit = ""
    if selection.limit is not None:
        limit = "LIMIT ?"
        params.append(str(selection.limit))
    with connect(path, write=False) as con:
        rows = con.execute(
            f"""SELECT digest, id, prompt_digest, split, meta, canonical FROM examples
                {"WHERE " + " AND ".join(where) if where else ""}
                ORDER BY {order} {limit.replace("?", "?::BIGINT")}""",
            params,
        ).fetchall()
    return [Row(*row) for row in rows]


def read(path: Path, key: str) -> pa.Table:
    """Digest, split and canonical text of every member, sorted by digest."""
    with connect(path, write=False) as con:
        table = con.sql(
            """SELECT m.digest, m.split, e.canonical FROM members m
               JOIN examples e ON e.digest = m.digest
               WHERE m.key = ? ORDER BY m.digest""",
            params=[key],
        ).to_arrow_table()
    return table.cast(SNAPSHOT_SCHEMA)


def verify(path: Path, key: str, snapshot: Sequence[Member] | None) -> Report:
    """Compare what is stored with what the manifest says.

    Args:
        path: the catalog.
        key: the dataset.
        snapshot: members according to the dataset's snapshot, if there is one whose digest
            is right; it names a member that was taken out or put in.

    Raises:
        DatasetError: if there is no such manifest.
    """
    with connect(path, write=False) as con:
        manifest = _find(con, key)
        if manifest is None:
            raise DatasetError(not_found(key, path))
        members = con.execute(
            "SELECT position, digest, split FROM members WHERE key = ? ORDER BY position", [key]
        ).fetchall()
        stored = con.execute(
            """SELECT digest, id, prompt_digest, split, meta, canonical FROM examples
               WHERE digest IN (SELECT digest FROM members WHERE key = ?)""",
            [key],
        ).fetchall()
    rows = [Row(*row) for row in stored]
    examples = Counter(row.digest for row in rows)
    have = {digest: split for _, digest, split in members}
    named = Counter(digest for _, digest, _ in members)
    duplicated = [d for d in have if examples[d] > 1 or named[d] > 1]
    changed = [row.digest for row in rows if not _holds(row)]
    missing = [d for d in have if not examples[d]]
    notes: list[str] = []
    if snapshot is not None:
        known = {m.digest: m.split for m in snapshot}
        missing += [d for d in known if d not in have]
        extra = [d for d in have if d not in known]
        drifted = [d for d in have if d in known and known[d] != have[d]]
        notes += [f"{canonical.id_of(d)} moved to split {have[d]}" for d in drifted[:3]]
    else:
        # Without it, what stands in a place that is taken, or that there is none of.
        taken = Counter(position for position, _, _ in members)
        extra = [d for p, d, _ in members if taken[p] > 1 or not 0 <= p < manifest.count]
        extra = [d for d in extra if named[d] == 1]
    report = Report(missing, extra, _once(changed), duplicated, notes)
    if report.ok:
        now = [Member(digest, split) for digest, split in have.items()]
        counted = sum(split.count for split in manifest.splits.values())
        places = sorted(position for position, _, _ in members)
        if manifest.key != key or not manifest.count == counted == len(members):
            notes.append("the manifest's own key and counts do not agree with its members")
        elif places != list(range(manifest.count)):
            notes.append("the members' positions are not 0, 1, 2, ...")
        elif manifests.dataset_digest(now) != manifest.digest:
            notes.append(f"the members' digest is not the manifest's {manifest.digest[:12]}")
        elif manifests.split_digests(now) != manifest.splits:
            notes.append("the splits are not the manifest's")
    return report


def not_found(key: str, path: Path) -> str:
    """The message for an absent dataset, with the versions that are there."""
    name = manifests.parse_key(key)[0]
    have = [m.key for m, _ in listing(path)]
    near = [k for k in have if k.startswith(f"{name}-")] or have
    listed = ", ".join(near) if near else "none"
    return (
        f"dataset {key!r} is not in {path}; datasets found: {listed}."
        " Run `tunix-mlflow datasets list`, or ingest it"
    )


def _holds(row: Row) -> bool:
    """Whether the canonical text has the row's digest, and every column is what it says."""
    if canonical.digest(row.canonical.encode("utf-8")) != row.digest:
        return False
    return row_of(from_canonical(row.canonical)) == row


def _once(digests: list[str]) -> list[str]:
    return list(dict.fromkeys(digests))


def _open(path: Path, write: bool) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return duckdb.connect(str(path), read_only=not write)
        except duckdb.IOException as error:
            # Another program may hold the file without our lock, a notebook for instance.
            if "could not set lock" not in str(error).lower() or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def _transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    con.execute("BEGIN")
    try:
        yield
    except BaseException:
        con.execute("ROLLBACK")
        raise
    con.execute("COMMIT")


def _find(con: duckdb.DuckDBPyConnection, key: str) -> Manifest | None:
    rows = con.execute("SELECT document FROM manifests WHERE key = ?", [key]).fetchall()
    return manifests.from_document(rows[0][0]) if rows else None


def _already(con: duckdb.DuckDBPyConnection, make: Manifest) -> bool:
    have = _find(con, make.key)
    if have is None:
        return False
    if have.digest == make.digest and have.request == make.request:
        return True
    what = manifests.difference(have.request, make.request) or "other members"
    raise DatasetError(
        f"dataset {make.key} is already built with digest {have.digest[:16]}, and this one has"
        f" {make.digest[:16]} ({what}); give it a new version"
    )


def _insert(con: duckdb.DuckDBPyConnection, manifest: Manifest, members: Sequence[Member]) -> None:
    con.execute(
        "INSERT INTO manifests VALUES (?, ?, ?)",
        [
            manifest.key,
            manifests.to_document(manifest),
            datetime.now(UTC).replace(tzinfo=None),
        ],
    )
    table = pa.table(
        {
            "position": list(range(len(members))),
            "digest": [m.digest for m in members],
            "split": [m.split for m in members],
        },
        schema=pa.schema(
            [("position", pa.int64()), ("digest", pa.string()), ("split", pa.string())]
        ),
    )
    con.register("incoming", table)
    con.execute(
        "INSERT INTO members SELECT ?, position, digest, split FROM incoming",
        [manifest.key],
    )
    con.unregister("incoming")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
