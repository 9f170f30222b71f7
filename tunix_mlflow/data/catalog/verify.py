"""Compare what the catalog holds with what a manifest says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa

from tunix_mlflow.data import canonical
from tunix_mlflow.data.catalog import splits
from tunix_mlflow.data.catalog.columns import PARSED, TYPED
from tunix_mlflow.data.catalog.connection import connect
from tunix_mlflow.data.catalog.digests import Digests, digests_of, find_corrupted
from tunix_mlflow.data.catalog.read import find_in, not_found
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError

KINDS = ("missing", "extra", "changed", "duplicated", "split_drift", "snapshot_drift")


class Report(NamedTuple):
    """The differences that `verify` found: digests by kind, all empty if there are none."""

    missing: list[str]
    extra: list[str]
    changed: list[str]
    duplicated: list[str]
    split_drift: list[str]
    snapshot_drift: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether there is no difference."""
        return not any(self)

    def summary(self) -> str:
        """Return one line: kinds, counts and the first few names."""
        parts = []
        for kind in KINDS:
            digests: list[str] = getattr(self, kind)
            if digests:
                names = ", ".join(canonical.id_of(d) for d in digests[:3])
                more = ", ..." if len(digests) > 3 else ""
                parts.append(f"{len(digests)} {kind.replace('_', ' ')} ({names}{more})")
        return "; ".join(parts + self.notes) or "nothing"


def verify(path: Path, key: str, snapshot: pa.Table | None) -> Report:
    """Compare what is stored with what the manifest says.

    Args:
        path: the catalog.
        key: the dataset.
        snapshot: digest and split of each example, according to the dataset's snapshot, if
            there is one; it names a member that was removed or added.

    Raises:
        DatasetError: if there is no such manifest.
    """
    with connect(path, write=False) as con:
        manifest = find_in(con, key)
        if manifest is None:
            raise DatasetError(not_found(key, path))

        def digests(query: str) -> list[str]:
            return [d for (d,) in con.execute(query).fetchall()]

        con.execute(
            """CREATE TEMP TABLE mine AS
               SELECT position, digest, split FROM members WHERE key = ?""",
            [key],
        )
        with ThreadPoolExecutor(1) as pool:  # half of the work is Python's, half DuckDB's
            pending = pool.submit(_find_changed, con.cursor(), manifest)
            have = digests_of(con, "mine")
            notes = _notes(con, manifest, key, have)
            stored_once = _each_stored_once(con, manifest.count)
            candidates = pending.result()
        changed: list[str] = []
        if candidates:
            within = "SELECT DISTINCT digest FROM mine WHERE digest IN (SELECT unnest(?))"
            changed = [digest for (digest,) in con.execute(within, [candidates]).fetchall()]
        missing: list[str] = []
        extra: list[str] = []
        duplicated: list[str] = []
        drifted: list[str] = []
        if notes or not stored_once:
            missing = digests("SELECT DISTINCT digest FROM mine ANTI JOIN examples USING (digest)")
            duplicated = digests(
                """SELECT digest FROM mine GROUP BY digest HAVING count(*) > 1 UNION
                   SELECT digest FROM examples SEMI JOIN mine USING (digest)
                   GROUP BY digest HAVING count(*) > 1"""
            )
            if not (missing or changed or duplicated):
                drifted = _split_drift(con, manifest)
        snapshot_drift: list[str] = []
        if snapshot is not None:
            con.register("kept", snapshot)
            con.execute("CREATE TEMP TABLE known AS SELECT * FROM kept")
            con.unregister("kept")
            kept = digests_of(con, "known").dataset
            if not have.dataset == kept == manifest.digest:
                lost = digests("SELECT digest FROM known ANTI JOIN mine USING (digest)")
                extra = digests("SELECT DISTINCT digest FROM mine ANTI JOIN known USING (digest)")
                drifted += digests(
                    """SELECT DISTINCT digest FROM mine m JOIN known k USING (digest)
                       WHERE m.split <> k.split"""
                )
                if kept == manifest.digest:
                    missing += lost
                else:
                    snapshot_drift, extra, drifted = [*lost, *extra, *drifted], [], []
        elif notes:
            # Without a snapshot: members at a position that is taken, or out of range.
            extra = digests(
                f"""SELECT digest FROM mine
                    WHERE position NOT BETWEEN 0 AND {manifest.count - 1} OR position IN (
                        SELECT position FROM mine GROUP BY position HAVING count(*) > 1)"""
            )
            extra = [d for d in extra if d not in set(duplicated)]
    lists = (missing, extra, changed, duplicated, drifted, snapshot_drift)
    named = dict(zip(KINDS, (list(dict.fromkeys(kind)) for kind in lists), strict=True))
    return Report(**named, notes=[] if any(lists) else notes)


def _find_changed(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> list[str]:
    """Return examples whose text has another digest, or whose columns do not follow from it.

    All of the dataset's are checked, and perhaps others.
    """
    stored = con.execute("SELECT count(*) FROM examples").fetchall()[0][0]
    only, params = "", []
    # A join carries every text along: a dataset that is most of the catalog is checked with all.
    if manifest.count * 2 < stored:
        only = "SEMI JOIN (SELECT digest FROM members WHERE key = ?) USING (digest)"
        params = [manifest.key]
    try:
        return _differing(con, only, params, PARSED)
    except (duckdb.InvalidInputException, duckdb.ConversionException):
        # A text is not JSON. TRY is slower by a third.
        return _differing(con, only, params, f"TRY({PARSED})")


def _differing(
    con: duckdb.DuckDBPyConnection, only: str, params: list[str], parsed: str
) -> list[str]:
    differs = " OR ".join(f"{name} IS DISTINCT FROM {sql}" for name, sql in TYPED.items())
    rows = con.sql(
        f"""SELECT digest, canonical, coalesce({differs}, true) AS wrong
            FROM (SELECT *, {parsed} AS d FROM examples {only})""",
        params=params,
    )
    digests: list[str] = []
    for batch in rows.to_arrow_reader(10_000):
        if batch["wrong"].true_count:
            digests += batch["digest"].filter(batch["wrong"]).to_pylist()
        digests += find_corrupted(batch)
    return digests


def _each_stored_once(con: duckdb.DuckDBPyConnection, count: int) -> bool:
    """Return whether every member is stored, and stored once."""
    rows = con.execute(
        "SELECT count(*), count(e.digest) FROM mine m LEFT JOIN examples e USING (digest)"
    ).fetchall()
    return rows == [(count, count)]


def _split_drift(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> list[str]:
    """Return the members that are in another split than the request gives them."""
    own, params = "SELECT NULL::VARCHAR AS digest, NULL::VARCHAR AS split WHERE false", []
    split = "e.split"
    if manifest.parent is not None:  # its members have the splits that the parent gave them
        own, params = "SELECT digest, split FROM members WHERE key = ?", [manifest.parent_key]
        split = "p.split"
    con.execute(
        f"""CREATE TEMP TABLE chosen AS
            SELECT m.position, e.digest, e.prompt_digest, {split} AS split
            FROM mine m JOIN examples e USING (digest) LEFT JOIN ({own}) p USING (digest)""",
        params,
    )
    try:
        splits.assign(con, manifest.request)
    except DatasetError:
        return []  # an extra member brought the conflict, and is named as such
    rows = con.execute(
        "SELECT digest FROM mine m JOIN divided d USING (digest) WHERE m.split <> d.split"
    ).fetchall()
    return [d for (d,) in rows]


def _notes(
    con: duckdb.DuckDBPyConnection, manifest: Manifest, key: str, have: Digests
) -> list[str]:
    """Return how the members as a whole differ from the manifest."""
    count = sum(split.count for split in have.splits.values())
    counted = sum(split.count for split in manifest.splits.values())
    positions = con.execute(
        "SELECT min(position), max(position), count(DISTINCT position) FROM mine"
    ).fetchall()[0]
    if manifest.key != key or not manifest.count == counted == count:
        return ["the manifest's own key and counts do not agree with its members"]
    if positions != (0, count - 1, count):
        return ["the members' positions are not 0, 1, 2, ..."]
    if have.dataset != manifest.digest:
        return [f"the members' digest is not the manifest's {manifest.digest[:12]}"]
    return [] if have.splits == manifest.splits else ["the splits are not the manifest's"]
