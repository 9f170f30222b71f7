"""The catalog: every SQL statement of the project, but for the schema.

One DuckDB file below the state root. It is opened for one operation at a time, under a lock
file of our own, and never while training. Nothing here opens the file as a file: that would
drop DuckDB's own lock. The canonical text of an example is what counts; every other column is
derived from it, in SQL, when it is stored, and derived again when it is verified.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunix_mlflow import paths
from tunix_mlflow.data import canonical, lock, migrations
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.manifest import Manifest, Selection, Split
from tunix_mlflow.data.migrations import PARSED, TYPED, derived
from tunix_mlflow.data.staging import Stage
from tunix_mlflow.errors import DatasetError

MEMORY = "384MB"  # DuckDB's own; it spills to the disk beyond
_CHUNK = 20_000  # rows that a reader gets at a time
_PERCENTILES = (50, 90, 99)
KINDS = ("missing", "extra", "changed", "duplicated", "split_drift", "snapshot_drift")


class Report(NamedTuple):
    """What `verify` found; digests by kind. All empty means: exactly what the manifest says."""

    missing: list[str]
    extra: list[str]
    changed: list[str]
    duplicated: list[str]
    split_drift: list[str]
    snapshot_drift: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not any(self)

    def summary(self) -> str:
        """One line: kinds, counts and the first few names."""
        parts = []
        for kind in KINDS:
            found: list[str] = getattr(self, kind)
            if found:
                names = ", ".join(canonical.id_of(d) for d in found[:3])
                more = ", ..." if len(found) > 3 else ""
                parts.append(f"{len(found)} {kind.replace('_', ' ')} ({names}{more})")
        return "; ".join(parts + self.notes) or "nothing"


class Conflict(NamedTuple):
    """An example whose prompt the data put into another split too."""

    digest: str
    source: int
    number: int
    split: str
    canonical: str


class Difference(NamedTuple):
    """What sets two datasets apart, as digests; `changed` pairs share a prompt."""

    added: list[str]
    removed: list[str]
    changed: list[tuple[str, str]]
    moved: list[tuple[str, str, str]]  # digest, split before, split after


@contextmanager
def connect(path: Path, *, write: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for one operation.

    Raises:
        DatasetError: if the file is damaged, newer than this version, absent (for reading),
            or held by another process for too long.
    """
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"cannot create {path.parent}: {error.strerror}") from error
    elif not path.exists():
        raise DatasetError(f"there is no catalog at {path} yet; seed or ingest a dataset first")
    try:
        if not write and _is_older(path):
            with connect(path, write=True):
                pass  # migrated
        with lock.held(path, write=write):
            con = _open(path, write)
            try:
                if write:
                    migrations.migrate(con, path)
                yield con
            finally:
                con.close()
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


def provenance(path: Path, key: str) -> list[dict[str, Any]]:
    """The files that a dataset was ingested from."""
    with connect(path, write=False) as con:
        rows = con.execute("SELECT document FROM sources WHERE key = ?", [key]).fetchall()
    return [canonical.decode(text) for (text,) in rows]


def conflicts(path: Path, stage: Stage) -> list[Conflict]:
    """Staged examples that must go, lest their prompt stand in two splits.

    Of the splits that a prompt stands in, test wins over the others, those over train.
    """
    with connect(path, write=True) as con:
        _stage(con, stage)
        _derive(con, stage, "TRUE", 0)
        rows = con.execute(
            """WITH winner AS (
                 SELECT prompt, arg_max(split, (split <> 'train', split = 'test', split)) AS kept
                 FROM derived WHERE split IS NOT NULL
                 GROUP BY prompt HAVING count(DISTINCT split) > 1)
               SELECT d.digest, s.source, s.number, d.split, d.canonical
               FROM derived d JOIN winner w USING (prompt) JOIN staged s ON s.position = d.seq
               WHERE d.split IS NOT NULL AND d.split <> w.kept ORDER BY d.seq"""
        ).fetchall()
    return [Conflict(*row) for row in rows]


def ingest(
    path: Path,
    stage: Stage,
    key: str,
    request: dict[str, Any],
    sources: list[dict[str, Any]],
) -> tuple[Manifest, bool]:
    """Store staged examples and the dataset they make, in one transaction.

    Args:
        path: the catalog.
        stage: examples; one that is there already is kept once.
        key: of the dataset.
        request: how it was asked for; its `splits` are used, its `content` is added.
        sources: provenance.

    Returns:
        The manifest, and False if that very one was there and nothing was changed.

    Raises:
        DatasetError: if the key names another dataset, or a prompt has two splits.
    """
    with connect(path, write=True) as con, _transaction(con):
        _stage(con, stage)
        base = con.execute("SELECT coalesce(max(seq), -1) + 1 FROM examples").fetchall()[0][0]
        con.execute(
            """CREATE TEMP TABLE fresh AS SELECT min(position) AS position
               FROM staged ANTI JOIN examples USING (digest) GROUP BY digest"""
        )
        fresh = con.execute("SELECT count(*) FROM fresh").fetchall()[0][0]
        if fresh:
            # A join carries every text along: spare it where all is new.
            some = "" if fresh == stage.rows else "SEMI JOIN fresh USING (position)"
            source = f"""(SELECT position + {int(base)} AS seq, digest, canonical
                          FROM incoming {some})"""
            con.register("incoming", stage.batches())
            con.execute("INSERT INTO examples " + derived(source))
            con.unregister("incoming")
        con.execute(
            """CREATE TEMP TABLE chosen AS
               SELECT s.position, e.digest, e.prompt, e.split, e.steps, e.characters, e.tokens
               FROM (SELECT digest, min(position) AS position FROM staged GROUP BY digest) s
               JOIN examples e USING (digest)"""
        )
        made = _manifest(con, key, request, None, content=True)
        made.stats["duplicates_dropped"] = stage.rows - made.count
        return _insert_manifest(con, made, sources)


def build(path: Path, key: str, selection: Selection) -> tuple[Manifest, bool]:
    """Make a dataset of the examples that a request means.

    Returns:
        The manifest, and False if that very one was there and nothing was changed.

    Raises:
        DatasetError: for a filter that is not plain, when nothing is selected, or when the key
            names another dataset.
    """
    where, params = _where(selection)
    order = {"all": "seq", "latest": "seq DESC", "random": "sha256(? || ':' || digest), digest"}
    arguments: list[Any] = [*params]
    if selection.order == "random":
        arguments.append(str(selection.seed))
    limit = ""
    if selection.limit is not None:
        limit = f"LIMIT {int(selection.limit)}"
    request: dict[str, Any] = {
        "filters": selection.filters,
        "order": selection.order,
        "seed": selection.seed,
        "limit": selection.limit,
        "splits": selection.splits,
        "parent": selection.parent,
    }
    manifests.bounds(selection.splits)
    with connect(path, write=True) as con, _transaction(con):
        parent, source = None, "examples"
        if selection.parent is not None:
            found = _find(con, selection.parent)
            if found is None:
                raise DatasetError(f"there is no dataset {selection.parent!r} to select from")
            parent = f"{found.key}@{found.digest}"
            source = """(SELECT e.* FROM examples e
                         SEMI JOIN members m ON m.digest = e.digest AND m.key = ?)"""
            arguments = [selection.parent, *arguments]
        con.execute(
            f"""CREATE TEMP TABLE chosen AS
                SELECT row_number() OVER () - 1 AS position, digest, prompt, split,
                    steps, characters, tokens
                FROM (SELECT * EXCLUDE (canonical, meta) FROM {source} {where}
                      ORDER BY {order[selection.order]} {limit})""",
            arguments,
        )
        if not con.execute("SELECT count(*) FROM chosen").fetchall()[0][0]:
            raise DatasetError("no example in the catalog meets the request; loosen its filters")
        return _insert_manifest(con, _manifest(con, key, request, parent), [])


def stream(path: Path, key: str, *, asked: bool = False) -> Generator[pa.RecordBatch, None, None]:
    """digest, split, prompt (its digest) and canonical of every member, in order of ingest.

    With `asked`, also the text of the last user message. A few thousand rows at a time.
    """
    turns = """from_json(e.canonical, '{"messages":[{"role":"VARCHAR","content":"VARCHAR"}]}')"""
    text = f"""coalesce(list_filter({turns}.messages,
               lambda m: m.role = 'user')[-1].content, '') AS asked,"""
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

        def part(low: int, high: int) -> pa.RecordBatch:
            table = con.sql(
                f"""SELECT e.seq, e.digest, w.split, e.prompt, {text if asked else ""} e.canonical
                    FROM examples e JOIN wanted w USING (seq)
                    WHERE e.seq BETWEEN ? AND ? AND w.seq BETWEEN ? AND ?""",
                params=[low, high, low, high],
            ).to_arrow_table()
            (batch,) = table.combine_chunks().to_batches()
            return batch.take(pc.sort_indices(batch["seq"])).drop_columns("seq")

        # The next part is read while the caller works on this one.
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(part, *ranges[0]) if ranges else None
            for bounds in [*ranges[1:], None]:
                batch = coming.result() if coming else None
                coming = ahead.submit(part, *bounds) if bounds else None
                if batch is not None:
                    yield batch


def texts(path: Path, digests: list[str]) -> dict[str, str]:
    """Canonical text by digest."""
    with connect(path, write=False) as con:
        rows = con.execute(
            "SELECT digest, canonical FROM examples WHERE digest IN (SELECT unnest(?))", [digests]
        ).fetchall()
    return dict(rows)


def find_corrupted(batch: pa.RecordBatch) -> list[str]:
    """The digests of those examples whose canonical text is not what its digest says."""
    texts, ends = _text(batch["canonical"])
    # hashlib uses the processor's SHA instructions, DuckDB's sha256 does not.
    sums = [hashlib.sha256(texts[a:b]).digest() for a, b in itertools.pairwise(ends)]
    if bytes(_block(batch["digest"])) == b"".join(sums).hex().encode():
        return []
    names = batch["digest"].to_pylist()
    return [name for name, own in zip(names, sums, strict=True) if name != own.hex()]


def members_digest(path: Path, key: str) -> str:
    """The dataset digest that the stored members have now."""
    with connect(path, write=False) as con:
        con.execute("CREATE TEMP TABLE mine AS SELECT * FROM members WHERE key = ?", [key])
        return _digests(con, "mine").dataset


def verify(path: Path, key: str, snapshot: pa.Table | None) -> Report:
    """Compare what is stored with what the manifest says.

    Args:
        path: the catalog.
        key: the dataset.
        snapshot: digest and split of each example, according to the dataset's snapshot, if
            there is one; it names a member that was taken out or put in.

    Raises:
        DatasetError: if there is no such manifest.
    """
    with connect(path, write=False) as con:
        manifest = _find(con, key)
        if manifest is None:
            raise DatasetError(not_found(key, path))

        def digests(query: str) -> list[str]:
            return [d for (d,) in con.execute(query).fetchall()]

        con.execute(
            """CREATE TEMP TABLE mine AS
               SELECT position, digest, split FROM members WHERE key = ?""",
            [key],
        )
        with ThreadPoolExecutor(1) as beside:  # half of it is Python's, half DuckDB's
            looked = beside.submit(_wrong, con.cursor(), manifest)
            have = _digests(con, "mine")
            notes = _notes(con, manifest, key, have)
            once = _each_once(con, manifest.count)
            wrong = looked.result()
        changed: list[str] = []
        if wrong:
            within = "SELECT DISTINCT digest FROM mine WHERE digest IN (SELECT unnest(?))"
            changed = [digest for (digest,) in con.execute(within, [wrong]).fetchall()]
        missing: list[str] = []
        extra: list[str] = []
        duplicated: list[str] = []
        drifted: list[str] = []
        if notes or not once:
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
            kept = _digests(con, "known").dataset
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
            # Without it, what stands in a place that is taken, or that there is none of.
            extra = digests(
                f"""SELECT digest FROM mine
                    WHERE position NOT BETWEEN 0 AND {manifest.count - 1} OR position IN (
                        SELECT position FROM mine GROUP BY position HAVING count(*) > 1)"""
            )
            extra = [d for d in extra if d not in set(duplicated)]
    found = (missing, extra, changed, duplicated, drifted, snapshot_drift)
    named = dict(zip(KINDS, (list(dict.fromkeys(kind)) for kind in found), strict=True))
    return Report(**named, notes=[] if any(found) else notes)


def diff(path: Path, before: str, after: str) -> Difference:
    """What `after` has that `before` has not, and the other way round."""
    with connect(path, write=False) as con:
        for key in (before, after):
            if _find(con, key) is None:
                raise DatasetError(f"dataset {key!r} is not in {path}")
        con.execute(
            """CREATE TEMP TABLE a AS SELECT m.digest, m.split, e.prompt FROM members m
               LEFT JOIN examples e USING (digest) WHERE m.key = ?""",
            [before],
        )
        con.execute(
            """CREATE TEMP TABLE b AS SELECT m.digest, m.split, e.prompt FROM members m
               LEFT JOIN examples e USING (digest) WHERE m.key = ?""",
            [after],
        )
        con.execute("CREATE TEMP TABLE gone AS SELECT * FROM a ANTI JOIN b USING (digest)")
        con.execute("CREATE TEMP TABLE came AS SELECT * FROM b ANTI JOIN a USING (digest)")
        # The n-th that went with the n-th that came, of those that share a prompt.
        number = "row_number() OVER (PARTITION BY prompt ORDER BY digest)"
        con.execute(
            f"""CREATE TEMP TABLE pairs AS SELECT g.digest AS old, c.digest AS new
                FROM (SELECT *, {number} AS n FROM gone WHERE prompt IS NOT NULL) g
                JOIN (SELECT *, {number} AS n FROM came WHERE prompt IS NOT NULL) c
                USING (prompt, n)"""
        )
        added = con.execute(
            "SELECT digest FROM came WHERE digest NOT IN (SELECT new FROM pairs) ORDER BY 1"
        ).fetchall()
        removed = con.execute(
            "SELECT digest FROM gone WHERE digest NOT IN (SELECT old FROM pairs) ORDER BY 1"
        ).fetchall()
        changed = con.execute("SELECT old, new FROM pairs ORDER BY 1").fetchall()
        moved = con.execute(
            """SELECT digest, a.split, b.split FROM a JOIN b USING (digest)
               WHERE a.split <> b.split ORDER BY 1"""
        ).fetchall()
    return Difference([d for (d,) in added], [d for (d,) in removed], changed, moved)


def longer_than(path: Path, key: str, tokens: int) -> int:
    """How many examples of a dataset have more byte tokens than that."""
    with connect(path, write=False) as con:
        return int(
            con.execute(
                """SELECT count(*) FROM examples SEMI JOIN
                   (SELECT digest FROM members WHERE key = ?) USING (digest) WHERE tokens > ?""",
                [key, tokens],
            ).fetchall()[0][0]
        )


def unreferenced(path: Path, *, remove: bool) -> tuple[int, int]:
    """Examples that no dataset has: their number and the bytes of their texts."""
    with connect(path, write=remove) as con, _transaction(con):
        found = con.execute(
            """SELECT count(*), coalesce(sum(strlen(canonical)), 0)::BIGINT
               FROM examples ANTI JOIN members USING (digest)"""
        ).fetchall()
        if remove:
            con.execute("DELETE FROM examples WHERE digest NOT IN (SELECT digest FROM members)")
    return int(found[0][0]), int(found[0][1])


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


def _stage(con: duckdb.DuckDBPyConnection, stage: Stage) -> None:
    con.register("incoming", stage.batches())
    con.execute("CREATE TEMP TABLE staged AS SELECT position, source, number, digest FROM incoming")
    con.unregister("incoming")


def _derive(con: duckdb.DuckDBPyConnection, stage: Stage, where: str, base: int) -> None:
    source = f"(SELECT position + {base} AS seq, digest, canonical FROM incoming WHERE {where})"
    con.register("incoming", stage.batches())
    con.execute("CREATE TEMP TABLE derived AS " + derived(source))
    con.unregister("incoming")


def _where(selection: Selection) -> tuple[str, list[Any]]:
    """Filters as SQL. Values are bound, and compared with values of their own type alone."""
    parts, params = [], []
    symbols = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for key, operator, value in manifests.conditions(selection):
        place = f'$."{key}"'
        if operator in symbols:
            sql, bound = _comparison(place, symbols[operator], value)
        else:
            each = [_comparison(place, "=", v) for v in (value if _many(value) else [value])]
            sql = "(" + " OR ".join(s for s, _ in each) + ")"
            bound = [b for _, many in each for b in many]
        if operator in ("ne", "not_in"):
            sql = f"NOT coalesce({sql}, false)"  # a key that is absent is not equal
        parts.append(sql)
        params += bound
    return ("WHERE " + " AND ".join(parts) if parts else ""), params


def _many(value: Any) -> bool:
    return isinstance(value, list)


def _comparison(place: str, symbol: str, value: Any) -> tuple[str, list[Any]]:
    text = "json_extract_string(meta, ?)"
    if isinstance(value, bool):
        sql = f"(json_type(meta, ?) = 'BOOLEAN' AND {text} {symbol} ?)"
        return sql, [place, place, "true" if value else "false"]
    if isinstance(value, str):
        return f"(json_type(meta, ?) = 'VARCHAR' AND {text} {symbol} ?)", [place, place, value]
    kinds = "('UBIGINT', 'BIGINT', 'DOUBLE')"
    sql = f"(json_type(meta, ?) IN {kinds} AND TRY_CAST({text} AS DOUBLE) {symbol} ?::DOUBLE)"
    return sql, [place, place, float(value)]


def _manifest(
    con: duckdb.DuckDBPyConnection,
    key: str,
    request: dict[str, Any],
    parent: str | None,
    *,
    content: bool = False,
) -> Manifest:
    """The manifest of the temporary table `chosen`; its members go to `divided`.

    With `content`, the request gets the digest of what was given.
    """
    _divide(con, request["splits"])
    found = _digests(con, "divided")
    return Manifest(
        key=key,
        digest=found.dataset,
        count=sum(split.count for split in found.splits.values()),
        splits=found.splits,
        request=request | ({"content": found.content} if content else {}),
        stats=_statistics(con),
        parent=parent,
    )


def _divide(con: duckdb.DuckDBPyConnection, splits: dict[str, float]) -> None:
    """Give every chosen example its split.

    The data's own splits if any example has one: an example without one joins its prompt's,
    else train. Without any, by the hash of the prompt, so that a prompt keeps its split when
    the dataset grows. No prompt ever stands in two splits.
    """
    torn = con.execute(
        """SELECT min(digest), list_sort(list(DISTINCT split)) FROM chosen
           WHERE split IS NOT NULL
           GROUP BY prompt HAVING count(DISTINCT split) > 1 ORDER BY 1 LIMIT 1"""
    ).fetchall()
    if torn:
        digest, (first, second, *_) = torn[0]
        raise DatasetError(
            f"the same prompt stands in the splits {first!r} and {second!r}"
            f" (example {canonical.id_of(digest)}); leave it in one of them, or ingest with"
            " --skip-bad, which keeps the held-out one"
        )
    if con.execute("SELECT count(split) FROM chosen").fetchall()[0][0]:
        con.execute(
            f"""CREATE TEMP TABLE divided AS
                SELECT c.position, c.digest, coalesce(own.split, '{manifests.TRAIN}') AS split
                FROM chosen c LEFT JOIN (SELECT prompt, min(split) AS split FROM chosen
                     WHERE split IS NOT NULL GROUP BY prompt) own USING (prompt)"""
        )
        return
    case, params = _case(splits)
    con.execute(
        f"CREATE TEMP TABLE divided AS SELECT position, digest, {case} AS split FROM chosen",
        params,
    )


def _case(splits: dict[str, float]) -> tuple[str, list[str]]:
    params: list[str] = []
    whens = ""
    for name, bound in manifests.bounds(splits):
        whens += " WHEN prompt[1:16] < ? THEN ?"
        params += [bound, name]
    return (f"CASE{whens} ELSE '{manifests.TRAIN}' END" if whens else "'train'"), params


def _wrong(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> list[str]:
    """Examples whose text is not what their digest says, or whose columns not what the text says.

    All of the dataset's are looked at, and perhaps others.
    """
    stored = con.execute("SELECT count(*) FROM examples").fetchall()[0][0]
    only, params = "", []
    # A join carries every text along: where most of the catalog is meant, look at it all.
    if manifest.count * 2 < stored:
        only = "SEMI JOIN (SELECT digest FROM members WHERE key = ?) USING (digest)"
        params = [manifest.key]
    try:
        return _differing(con, only, params, PARSED)
    except (duckdb.InvalidInputException, duckdb.ConversionException):
        # A text is no JSON. TRY is slower by a third.
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
    found: list[str] = []
    for batch in rows.to_arrow_reader(10_000):
        if batch["wrong"].true_count:
            found += batch["digest"].filter(batch["wrong"]).to_pylist()
        found += find_corrupted(batch)
    return found


def _each_once(con: duckdb.DuckDBPyConnection, count: int) -> bool:
    """Whether every member is stored, and stored once."""
    found = con.execute(
        "SELECT count(*), count(e.digest) FROM mine m LEFT JOIN examples e USING (digest)"
    ).fetchall()
    return found == [(count, count)]


def _split_drift(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> list[str]:
    """Members that stand in another split than the request gives them."""
    if not isinstance(manifest.request.get("splits"), dict):
        return []  # made before splits were part of the request
    con.execute(
        """CREATE TEMP TABLE chosen AS SELECT m.position, e.digest, e.prompt, e.split
           FROM mine m JOIN examples e USING (digest)"""
    )
    try:
        _divide(con, manifest.request["splits"])
    except DatasetError:
        return []  # an extra member brought the conflict; it is named as such
    found = con.execute(
        "SELECT digest FROM mine m JOIN divided d USING (digest) WHERE m.split <> d.split"
    ).fetchall()
    return [d for (d,) in found]


def _notes(
    con: duckdb.DuckDBPyConnection, manifest: Manifest, key: str, have: _Digests
) -> list[str]:
    """What of the members is not as the manifest says, as a whole."""
    count = sum(split.count for split in have.splits.values())
    counted = sum(split.count for split in manifest.splits.values())
    places = con.execute(
        "SELECT min(position), max(position), count(DISTINCT position) FROM mine"
    ).fetchall()[0]
    if manifest.key != key or not manifest.count == counted == count:
        return ["the manifest's own key and counts do not agree with its members"]
    if places != (0, count - 1, count):
        return ["the members' positions are not 0, 1, 2, ..."]
    if have.dataset != manifest.digest:
        return [f"the members' digest is not the manifest's {manifest.digest[:12]}"]
    return [] if have.splits == manifest.splits else ["the splits are not the manifest's"]


def _statistics(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Figures that describe the chosen examples; flat, as MLflow's profile wants them."""
    shares = ", ".join(f"{p / 100}" for p in _PERCENTILES)
    columns = ("steps", "characters", "tokens")
    parts = ", ".join(f"avg({c}), quantile_disc({c}, [{shares}]), max({c})" for c in columns)
    row = con.execute(
        f"SELECT count(DISTINCT prompt), count(*) FILTER (steps = 0), {parts} FROM chosen"
    ).fetchall()[0]
    found: dict[str, Any] = {"distinct_prompts": row[0], "without_steps": row[1]}
    for i, name in enumerate(columns):
        mean, quantiles, most = row[2 + 3 * i : 5 + 3 * i]
        found[f"{name}_mean"] = round(float(mean), 3)
        for share, value in zip(_PERCENTILES, quantiles, strict=True):
            found[f"{name}_p{share}"] = int(value)
        found[f"{name}_max"] = int(most)
    return found


class _Digests(NamedTuple):
    content: str  # of the members alone
    dataset: str  # of the members and the splits they are in
    splits: dict[str, Split]


def _digests(con: duckdb.DuckDBPyConnection, table: str) -> _Digests:
    """Every digest of a table with digest and split, by one sorted pass over it.

    Each is `canonical.set_digest` of its lines, without a Python object a row.
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
        dataset.update(_block(batch["line"]))
        content.update(_block(batch["own"]))
        for name, hasher in splits.items():
            inside = pc.equal(batch["split"], name)
            hasher.update(_block(batch["own"].filter(inside)))
    return _Digests(
        content.hexdigest(),
        dataset.hexdigest(),
        {name: Split(count=n, digest=splits[name].hexdigest()) for name, n in counts.items()},
    )


def _block(column: pa.StringArray) -> memoryview:
    """The texts of a column as one block of bytes."""
    data, ends = _text(column)
    return data[ends[0] : ends[-1]]


def _text(column: pa.StringArray) -> tuple[memoryview, list[int]]:
    """The bytes of a column's texts, and where each begins and the last one ends."""
    if not len(column):
        return memoryview(b""), [0]
    _, offsets, data = column.cast(pa.string()).buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return memoryview(data), ends.tolist()


def _insert_manifest(
    con: duckdb.DuckDBPyConnection, made: Manifest, sources: list[dict[str, Any]]
) -> tuple[Manifest, bool]:
    have = _find(con, made.key)
    if have is not None:
        if have.digest == made.digest and have.request == made.request:
            return have, False
        what = manifests.difference(have.request, made.request) or "other members"
        raise DatasetError(
            f"dataset {made.key} is already built with digest {have.digest[:16]}, and this one"
            f" has {made.digest[:16]} ({what}); give it a new version"
        )
    now = datetime.now(UTC).replace(tzinfo=None)
    con.execute(
        "INSERT INTO manifests VALUES (?, ?, ?)", [made.key, manifests.to_document(made), now]
    )
    position = "position"
    if con.execute("SELECT max(position) FROM divided").fetchall()[0][0] >= made.count:
        position = "row_number() OVER (ORDER BY position) - 1"  # duplicates left gaps
    con.execute(f"INSERT INTO members SELECT ?, {position}, digest, split FROM divided", [made.key])
    for source in sources:
        con.execute(
            "INSERT INTO sources VALUES (?, ?)", [made.key, canonical.encode(source).decode()]
        )
    return made, True


def _open(path: Path, write: bool) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + lock.WAIT_SECONDS
    # Nothing but the file itself: no other file is read or written through SQL.
    config: dict[str, Any] = {
        "enable_external_access": "false",
        "lock_configuration": "true",
        "memory_limit": MEMORY,
        "preserve_insertion_order": "false",
        "temp_directory": str(paths.temporary_dir()),
    }
    while True:
        try:
            return duckdb.connect(str(path), read_only=not write, config=config)
        except duckdb.IOException as error:
            # Another program may hold the file without our lock, a notebook for instance.
            if "could not set lock" not in str(error).lower() or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _is_older(path: Path) -> bool:
    with lock.held(path, write=False):
        con = _open(path, False)
        try:
            return bool(migrations.check(con, path))
        finally:
            con.close()


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
