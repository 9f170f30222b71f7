"""The catalog's schema: an append-only list of named migrations.

A migration is literal SQL, frozen once it is released: it calls no code of ours, so that it does
the same to a file in every later version. Each runs in one transaction with its own record. A
file with a migration that is not in the list was written by a newer version, and is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tunix_mlflow.errors import DatasetError

if TYPE_CHECKING:
    import duckdb


class Migration(NamedTuple):
    """A name, and the SQL statements that it stands for."""

    name: str
    sql: str


# Texts are stored uncompressed: compressing them costs more than all the rest of an ingest.
M001 = Migration(
    "m001_examples_manifests_members_sources",
    """
    CREATE TABLE examples (
        seq BIGINT NOT NULL,
        digest VARCHAR NOT NULL USING COMPRESSION uncompressed,
        prompt_digest VARCHAR NOT NULL USING COMPRESSION uncompressed,
        split VARCHAR,
        meta VARCHAR NOT NULL USING COMPRESSION uncompressed,
        steps INTEGER NOT NULL,
        characters BIGINT NOT NULL,
        tokens BIGINT NOT NULL,
        canonical VARCHAR NOT NULL USING COMPRESSION uncompressed);
    CREATE TABLE manifests (
        key VARCHAR PRIMARY KEY,
        document VARCHAR NOT NULL,
        created_at TIMESTAMP NOT NULL);
    CREATE TABLE members (
        key VARCHAR NOT NULL,
        position BIGINT NOT NULL,
        digest VARCHAR NOT NULL USING COMPRESSION uncompressed,
        split VARCHAR NOT NULL);
    CREATE TABLE sources (
        key VARCHAR NOT NULL,
        document VARCHAR NOT NULL);
    """,
)

# The number of tokens depends on the tokenizer and the template, and follows from no SQL.
M002 = Migration("m002_no_tokens", "ALTER TABLE examples DROP COLUMN tokens;")

MIGRATIONS: tuple[Migration, ...] = (M001, M002)


def applied(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the names of the migrations that a file has, in order; none for an empty file."""
    tables = con.execute(
        "SELECT count(*) FROM information_schema.tables WHERE table_name = 'migrations'"
    ).fetchall()
    if not tables[0][0]:
        return []
    rows = con.execute("SELECT name FROM migrations ORDER BY number").fetchall()
    return [name for (name,) in rows]


def pending(con: duckdb.DuckDBPyConnection, path: object) -> list[str]:
    """Return the names of the migrations that a file lacks.

    Raises:
        DatasetError: if the file is newer than this version, or another program's.
    """
    have = applied(con)
    tables = con.execute("SELECT table_name FROM information_schema.tables").fetchall()
    if tables and not have:
        raise DatasetError(f"{path} is a database of another program; name another state root")
    known = [migration.name for migration in MIGRATIONS]
    if have != known[: len(have)]:
        raise DatasetError(
            f"{path} was written by a newer version of tunix-mlflow (it has {have[-1]});"
            " upgrade tunix-mlflow, or name another TUNIX_MLFLOW_HOME"
        )
    return known[len(have) :]


def migrate(con: duckdb.DuckDBPyConnection, path: object) -> None:
    """Bring a file up to this version.

    Raises:
        DatasetError: as :func:`pending`.
    """
    todo = pending(con, path)
    for number, migration in enumerate(MIGRATIONS):
        if migration.name not in todo:
            continue
        con.execute("BEGIN")
        con.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER, name VARCHAR)")
        con.execute(migration.sql)
        con.execute("INSERT INTO migrations VALUES (?, ?)", [number, migration.name])
        con.execute("COMMIT")
