"""The catalog's schema, as an append-only list of named functions.

Each runs in one transaction with its own record. A file that names a migration we do not
know was written by a newer version, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tunix_mlflow.errors import DatasetError

if TYPE_CHECKING:
    import duckdb


def m001_examples_and_manifests(con: duckdb.DuckDBPyConnection) -> None:
    """Examples by digest; manifests by key; the members that tie them."""
    con.execute("CREATE SEQUENCE ingest_order")
    con.execute(
        """CREATE TABLE examples (
            seq BIGINT NOT NULL DEFAULT nextval('ingest_order'),
            digest VARCHAR NOT NULL,
            id VARCHAR NOT NULL,
            prompt_digest VARCHAR NOT NULL,
            split VARCHAR,
            meta VARCHAR NOT NULL,
            canonical VARCHAR NOT NULL)"""
    )
    con.execute(
        """CREATE TABLE manifests (
            key VARCHAR PRIMARY KEY,
            document VARCHAR NOT NULL,
            created_at TIMESTAMP NOT NULL)"""
    )
    con.execute(
        """CREATE TABLE members (
            key VARCHAR NOT NULL,
            position BIGINT NOT NULL,
            digest VARCHAR NOT NULL,
            split VARCHAR NOT NULL)"""
    )


MIGRATIONS: tuple[Callable[[duckdb.DuckDBPyConnection], None], ...] = (m001_examples_and_manifests,)


def applied(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of the migrations that the file has, in order; none for an empty file."""
    found = con.execute(
        "SELECT count(*) FROM information_schema.tables WHERE table_name = 'migrations'"
    ).fetchall()
    if not found[0][0]:
        return []
    rows = con.execute("SELECT name FROM migrations ORDER BY number").fetchall()
    return [name for (name,) in rows]


def check(con: duckdb.DuckDBPyConnection, path: object) -> list[str]:
    """The names of the migrations still to come.

    Raises:
        DatasetError: if the file is newer than this version, or is another program's.
    """
    have = applied(con)
    tables = con.execute("SELECT table_name FROM information_schema.tables").fetchall()
    if tables and not have:
        raise DatasetError(f"{path} is a database of another program; name another state root")
    known = [m.__name__ for m in MIGRATIONS]
    if have != known[: len(have)]:
        raise DatasetError(
            f"{path} was written by a newer version of tunix-mlflow (it has {have[-1]});"
            " upgrade tunix-mlflow, or name another TUNIX_MLFLOW_HOME"
        )
    return known[len(have) :]


def migrate(con: duckdb.DuckDBPyConnection, path: object) -> None:
    """Bring the file up to this version.

    Raises:
        DatasetError: as :func:`check`.
    """
    todo = check(con, path)
    for number, migration in enumerate(MIGRATIONS):
        if migration.__name__ not in todo:
            continue
        con.execute("BEGIN")
        con.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER, name VARCHAR)")
        migration(con)
        con.execute("INSERT INTO migrations VALUES (?, ?)", [number, migration.__name__])
        con.execute("COMMIT")
