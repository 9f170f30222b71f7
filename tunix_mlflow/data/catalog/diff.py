"""Compare the members of two datasets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tunix_mlflow.data.catalog.connection import connect
from tunix_mlflow.data.catalog.read import find_in
from tunix_mlflow.errors import DatasetError


class Difference(NamedTuple):
    """How two datasets differ, as digests; the pairs of `changed` share a prompt."""

    added: list[str]
    removed: list[str]
    changed: list[tuple[str, str]]
    moved: list[tuple[str, str, str]]  # digest, split before, split after


def diff(path: Path, before: str, after: str) -> Difference:
    """Return what `after` has that `before` has not, and the other way round.

    Raises:
        DatasetError: if one of the datasets is not in the catalog.
    """
    with connect(path, write=False) as con:
        for table, key in (("a", before), ("b", after)):
            if find_in(con, key) is None:
                raise DatasetError(f"dataset {key!r} is not in {path}")
            con.execute(
                f"""CREATE TEMP TABLE {table} AS
                    SELECT m.digest, m.split, e.prompt_digest FROM members m
                    LEFT JOIN examples e USING (digest) WHERE m.key = ?""",
                [key],
            )
        con.execute("CREATE TEMP TABLE gone AS SELECT * FROM a ANTI JOIN b USING (digest)")
        con.execute("CREATE TEMP TABLE came AS SELECT * FROM b ANTI JOIN a USING (digest)")
        # Of the examples that share a prompt, the n-th removed pairs with the n-th added.
        number = "row_number() OVER (PARTITION BY prompt_digest ORDER BY digest)"
        con.execute(
            f"""CREATE TEMP TABLE pairs AS SELECT g.digest AS old, c.digest AS new
                FROM (SELECT *, {number} AS n FROM gone WHERE prompt_digest IS NOT NULL) g
                JOIN (SELECT *, {number} AS n FROM came WHERE prompt_digest IS NOT NULL) c
                USING (prompt_digest, n)"""
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
