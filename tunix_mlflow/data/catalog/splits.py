"""Assign the examples of a dataset to its splits, by prompt.

No prompt is ever in two splits. Data with splits of its own keeps them. What it lacks is decided
by the hash of the prompt, so that a prompt keeps its split when the dataset grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from tunix_mlflow.data import canonical
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.manifest import TRAIN, VALIDATION
from tunix_mlflow.errors import DatasetError


def assign(con: duckdb.DuckDBPyConnection, request: Mapping[str, Any]) -> int:
    """Write the table `divided` (position, digest, split) for the table `chosen`.

    Args:
        con: with the temporary table `chosen` (position, digest, prompt_digest, split, ...).
        request: how the dataset was made. Its `splits` are the shares of the prompts, used when
            no example has a split. When examples have splits, but none is in validation, the share
            of validation is taken from the train prompts; an example without a split joins its
            prompt's, else train. With `at_least_one`, a split that would be empty takes a prompt.

    Returns:
        How many examples went from train to validation; 0 if the data has a validation split, or
        no splits of its own, or so few prompts that train would be empty.

    Raises:
        DatasetError: if the examples of one prompt have different splits.
    """
    shares: Mapping[str, float] = request["splits"]
    _refuse_conflicts(con)
    own = {name for (name,) in con.execute("SELECT DISTINCT split FROM chosen").fetchall()}
    own.discard(None)
    if not own:
        case, params = _by_prompt("prompt_digest", manifests.bounds(shares))
        con.execute(
            f"CREATE TEMP TABLE divided AS SELECT position, digest, {case} AS split FROM chosen",
            params,
        )
        if request.get("at_least_one"):
            _fill_empty(con, [name for name, share in sorted(shares.items()) if share > 0])
        return 0
    split, params = f"coalesce(own.split, '{TRAIN}')", []
    take = VALIDATION not in own and shares.get(VALIDATION, 0.0) > 0
    if take:
        # Another hash than the prompt digest itself: of data that was split by that before, for
        # example an export, the train prompts are not spread evenly.
        hashed = f"sha256('{VALIDATION}:' || prompt_digest)"
        case, params = _by_prompt(hashed, manifests.bounds({VALIDATION: shares[VALIDATION]}))
        split = f"CASE {split} WHEN '{TRAIN}' THEN {case} ELSE own.split END"
    con.execute(
        f"""CREATE TEMP TABLE divided AS
            SELECT c.position, c.digest, {split} AS split
            FROM chosen c LEFT JOIN (SELECT prompt_digest, min(split) AS split FROM chosen
                 WHERE split IS NOT NULL GROUP BY prompt_digest) own USING (prompt_digest)""",
        params,
    )
    if not take:
        return 0
    counts = dict(con.execute("SELECT split, count(*) FROM divided GROUP BY 1").fetchall())
    if TRAIN not in counts:
        con.execute(f"UPDATE divided SET split = '{TRAIN}' WHERE split = '{VALIDATION}'")
        return 0
    return int(counts.get(VALIDATION, 0))


def _fill_empty(con: duckdb.DuckDBPyConnection, names: list[str]) -> None:
    """Give train, and then each split that has no prompt, one of the split with the most."""
    counts = dict(
        con.execute(
            """SELECT d.split, count(DISTINCT c.prompt_digest)
               FROM divided d JOIN chosen c USING (position) GROUP BY 1"""
        ).fetchall()
    )
    for name in [TRAIN, *names]:
        most = max(sorted(counts), key=lambda split: counts[split])
        if name in counts or (counts[most] < 2 and name != TRAIN):
            continue
        con.execute(
            """UPDATE divided SET split = $name WHERE position IN (
                   SELECT position FROM chosen WHERE prompt_digest = (
                       SELECT arg_min(c.prompt_digest, sha256($name || ':' || c.prompt_digest))
                       FROM chosen c JOIN divided d USING (position) WHERE d.split = $most))""",
            {"name": name, "most": most},
        )
        counts[most] -= 1
        counts[name] = 1
        counts = {split: count for split, count in counts.items() if count}


def _refuse_conflicts(con: duckdb.DuckDBPyConnection) -> None:
    conflicts = con.execute(
        """SELECT min(digest), list_sort(list(DISTINCT split)) FROM chosen
           WHERE split IS NOT NULL
           GROUP BY prompt_digest HAVING count(DISTINCT split) > 1 ORDER BY 1 LIMIT 1"""
    ).fetchall()
    if conflicts:
        digest, (first, second, *_) = conflicts[0]
        raise DatasetError(
            f"the same prompt is in the splits {first!r} and {second!r}"
            f" (example {canonical.id_of(digest)}); leave it in one of them, or ingest with"
            " --skip-bad, which keeps the held-out one"
        )


def _by_prompt(hashed: str, bounds: list[tuple[str, str]]) -> tuple[str, list[str]]:
    """Return an SQL expression for the split by a hash of the prompt, and its parameters."""
    params: list[str] = []
    whens = ""
    for name, bound in bounds:
        whens += f" WHEN ({hashed})[1:16] < ? THEN ?"
        params += [bound, name]
    return (f"CASE{whens} ELSE '{TRAIN}' END" if whens else f"'{TRAIN}'"), params
