"""Store examples and manifests in the catalog."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from tunix_mlflow.data import canonical
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog import filters, read, splits
from tunix_mlflow.data.catalog.columns import derived
from tunix_mlflow.data.catalog.connection import connect, transaction
from tunix_mlflow.data.catalog.digests import digests_of
from tunix_mlflow.data.manifest import Manifest, Selection
from tunix_mlflow.data.staging import Stage
from tunix_mlflow.errors import DatasetError

_PERCENTILES = (50, 90, 99)


class Conflict(NamedTuple):
    """An example whose prompt the data has in another split too."""

    digest: str
    source: int
    number: int
    split: str
    canonical: str


def conflicts(path: Path, stage: Stage) -> list[Conflict]:
    """Return the staged examples to leave out, so that no prompt is in two splits.

    Of the splits that a prompt is in, test wins over the others, and those over train.
    """
    with connect(path, write=True) as con:
        _register_stage(con, stage)
        con.register("incoming", stage.batches())
        source = "(SELECT position AS seq, digest, canonical FROM incoming)"
        con.execute("CREATE TEMP TABLE derived AS " + derived(source))
        con.unregister("incoming")
        rows = con.execute(
            """WITH winner AS (
                 SELECT prompt_digest,
                    arg_max(split, (split <> 'train', split = 'test', split)) AS kept
                 FROM derived WHERE split IS NOT NULL
                 GROUP BY prompt_digest HAVING count(DISTINCT split) > 1)
               SELECT d.digest, s.source, s.number, d.split, d.canonical
               FROM derived d JOIN winner w USING (prompt_digest)
               JOIN staged s ON s.position = d.seq
               WHERE d.split IS NOT NULL AND d.split <> w.kept ORDER BY d.seq"""
        ).fetchall()
    return [Conflict(*row) for row in rows]


def ingest(
    path: Path,
    stage: Stage,
    key: str,
    request: dict[str, Any],
    sources: list[dict[str, Any]],
    claim: Callable[[Manifest], None] = lambda manifest: None,
) -> tuple[Manifest, bool]:
    """Store staged examples and the dataset of them, in one transaction.

    Args:
        path: the catalog.
        stage: examples; one that is stored already is kept once.
        key: of the dataset.
        request: how the dataset was made; its `splits` are used, its `content` is added.
        sources: provenance.
        claim: called before anything of it is kept; what it raises ends the transaction.

    Returns:
        The manifest, and False if that very one was stored already and nothing was changed.

    Raises:
        DatasetError: if the key names another dataset, or a prompt has two splits.
    """
    with connect(path, write=True) as con, transaction(con):
        _register_stage(con, stage)
        base = con.execute("SELECT coalesce(max(seq), -1) + 1 FROM examples").fetchall()[0][0]
        con.execute(
            """CREATE TEMP TABLE added AS SELECT min(position) AS position
               FROM staged ANTI JOIN examples USING (digest) GROUP BY digest"""
        )
        added = con.execute("SELECT count(*) FROM added").fetchall()[0][0]
        if added:
            # A join carries every text along, so there is none when all examples are new.
            only = "" if added == stage.rows else "SEMI JOIN added USING (position)"
            source = f"""(SELECT position + {int(base)} AS seq, digest, canonical
                          FROM incoming {only})"""
            con.register("incoming", stage.batches())
            con.execute("INSERT INTO examples " + derived(source))
            con.unregister("incoming")
        con.execute(
            """CREATE TEMP TABLE chosen AS
               SELECT s.position, e.digest, e.prompt_digest, e.split,
                    e.steps, e.characters
               FROM (SELECT digest, min(position) AS position FROM staged GROUP BY digest) s
               JOIN examples e USING (digest)"""
        )
        manifest = _manifest_of_chosen(con, key, request, None, content=True)
        manifest.stats["duplicates_dropped"] = stage.rows - manifest.count
        return _insert_manifest(con, manifest, sources, claim)


def build(
    path: Path,
    key: str,
    selection: Selection,
    claim: Callable[[Manifest], None] = lambda manifest: None,
) -> tuple[Manifest, bool]:
    """Make a dataset of the examples that a selection matches.

    Examples keep the split that they have in the parent dataset, if one is named, or else the
    split of their own; see :func:`splits.assign` for those without.

    Returns:
        The manifest, and False if that very one was stored already and nothing was changed.

    Raises:
        DatasetError: for a filter that is not plain, when nothing is selected, or when the key
            names another dataset.
    """
    where, params = filters.where(selection)
    order = {"all": "seq", "latest": "seq DESC", "random": "sha256(? || ':' || digest), digest"}
    arguments: list[Any] = [*params]
    if selection.order == "random":
        arguments.append(str(selection.seed))
    limit = "" if selection.limit is None else f"LIMIT {int(selection.limit)}"
    request: dict[str, Any] = {
        "filters": selection.filters,
        "order": selection.order,
        "seed": selection.seed,
        "limit": selection.limit,
        "splits": selection.splits,
        "parent": selection.parent,
    }
    manifests.bounds(selection.splits)
    with connect(path, write=True) as con, transaction(con):
        parent, source = None, "examples"
        if selection.parent is not None:
            manifest = read.find_in(con, selection.parent)
            if manifest is None:
                raise DatasetError(f"there is no dataset {selection.parent!r} to select from")
            parent = f"{manifest.key}@{manifest.digest}"
            source = """(SELECT e.* REPLACE (m.split AS split) FROM examples e
                         JOIN members m ON m.digest = e.digest AND m.key = ?)"""
            arguments = [selection.parent, *arguments]
        con.execute(
            f"""CREATE TEMP TABLE chosen AS
                SELECT row_number() OVER () - 1 AS position, digest, prompt_digest, split,
                    steps, characters
                FROM (SELECT * EXCLUDE (canonical, meta) FROM {source} {where}
                      ORDER BY {order[selection.order]} {limit})""",
            arguments,
        )
        if not con.execute("SELECT count(*) FROM chosen").fetchall()[0][0]:
            raise DatasetError("no example in the catalog meets the request; loosen its filters")
        manifest = _manifest_of_chosen(con, key, request, parent)
        return _insert_manifest(con, manifest, [], claim)


def unreferenced(path: Path, *, remove: bool) -> tuple[int, int]:
    """Return the number of examples in no dataset, and the bytes of their texts."""
    with connect(path, write=remove) as con, transaction(con):
        rows = con.execute(
            """SELECT count(*), coalesce(sum(strlen(canonical)), 0)::BIGINT
               FROM examples ANTI JOIN members USING (digest)"""
        ).fetchall()
        if remove:
            con.execute("DELETE FROM examples WHERE digest NOT IN (SELECT digest FROM members)")
    return int(rows[0][0]), int(rows[0][1])


def _register_stage(con: duckdb.DuckDBPyConnection, stage: Stage) -> None:
    con.register("incoming", stage.batches())
    con.execute("CREATE TEMP TABLE staged AS SELECT position, source, number, digest FROM incoming")
    con.unregister("incoming")


def _manifest_of_chosen(
    con: duckdb.DuckDBPyConnection,
    key: str,
    request: dict[str, Any],
    parent: str | None,
    *,
    content: bool = False,
) -> Manifest:
    """Return the manifest of the table `chosen`; its members are written to `divided`.

    With `content`, the request gets the digest of the examples.
    """
    from_train = splits.assign(con, request)
    digests = digests_of(con, "divided")
    stats = _statistics(con)
    if from_train:
        stats["validation_from_train"] = from_train
    return Manifest(
        key=key,
        digest=digests.dataset,
        count=sum(split.count for split in digests.splits.values()),
        splits=digests.splits,
        request=request | ({"content": digests.content} if content else {}),
        stats=stats,
        parent=parent,
    )


def _statistics(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Return figures that describe the chosen examples; flat, as MLflow's profile requires."""
    shares = ", ".join(f"{p / 100}" for p in _PERCENTILES)
    columns = ("steps", "characters")
    parts = ", ".join(f"avg({c}), quantile_disc({c}, [{shares}]), max({c})" for c in columns)
    row = con.execute(
        f"""SELECT count(DISTINCT prompt_digest), count(*) FILTER (steps = 0), {parts}
            FROM chosen"""
    ).fetchall()[0]
    stats: dict[str, Any] = {"distinct_prompts": row[0], "without_steps": row[1]}
    for i, name in enumerate(columns):
        mean, quantiles, maximum = row[2 + 3 * i : 5 + 3 * i]
        rounded = round(float(mean), 3)
        # As canonical JSON has it, so that a manifest is the same when it is read back.
        stats[f"{name}_mean"] = int(rounded) if rounded.is_integer() else rounded
        for share, value in zip(_PERCENTILES, quantiles, strict=True):
            stats[f"{name}_p{share}"] = int(value)
        stats[f"{name}_max"] = int(maximum)
    return stats


def _insert_manifest(
    con: duckdb.DuckDBPyConnection,
    manifest: Manifest,
    sources: list[dict[str, Any]],
    claim: Callable[[Manifest], None],
) -> tuple[Manifest, bool]:
    have = read.find_in(con, manifest.key)
    if have is not None:
        if have.digest == manifest.digest and have.request == manifest.request:
            return have, False
        what = manifests.difference(have.request, manifest.request) or "other members"
        raise DatasetError(
            f"dataset {manifest.key} is already built with digest {have.digest[:16]}, and this one"
            f" has {manifest.digest[:16]} ({what}); give it a new version"
        )
    claim(manifest)
    now = datetime.now(UTC).replace(tzinfo=None)
    con.execute(
        "INSERT INTO manifests VALUES (?, ?, ?)",
        [manifest.key, manifests.to_document(manifest), now],
    )
    position = "position"
    if con.execute("SELECT max(position) FROM divided").fetchall()[0][0] >= manifest.count:
        position = "row_number() OVER (ORDER BY position) - 1"  # duplicates left gaps
    con.execute(
        f"INSERT INTO members SELECT ?, {position}, digest, split FROM divided", [manifest.key]
    )
    for source in sources:
        con.execute(
            "INSERT INTO sources VALUES (?, ?)", [manifest.key, canonical.encode(source).decode()]
        )
    return manifest, True
