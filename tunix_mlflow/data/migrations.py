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


_SHAPE = (
    '{"messages":[{"role":"VARCHAR","content":"VARCHAR","reasoning":"VARCHAR",'
    '"tool_calls":"VARCHAR"}],"steps":[{"content":"VARCHAR"}],"answer":"VARCHAR",'
    '"split":"VARCHAR","meta":"JSON"}'
)
PARSED = f"from_json(canonical, '{_SHAPE}')"
# Every typed column as a function of the parsed canonical text, `d`.
TYPED = {
    # As examples.prompt_digest.
    "prompt": """sha256(array_to_string(list_transform(
        CASE WHEN d.answer IS NULL AND len(d.messages) > 1
            THEN d.messages[:-2] ELSE d.messages END,
        lambda m: m.role || ':' || strlen(m.content) || ':' || m.content), ''))""",
    "split": "d.split",
    "meta": "coalesce(d.meta::VARCHAR, '{}')",
    "steps": "coalesce(len(d.steps), 0)::INTEGER",
    "characters": """(
        list_sum(list_transform(d.messages,
            lambda m: length(m.content) + coalesce(length(m.reasoning), 0)))
        + coalesce(list_sum(list_transform(d.steps, lambda s: length(s.content))), 0)
        + coalesce(length(d.answer), 0))::BIGINT""",
    # As chat.render and the byte tokenizer.
    "tokens": """(
        1 + list_sum(list_transform(d.messages, lambda m:
            1 + strlen(m.content) + coalesce(strlen(m.tool_calls), 0)
            + (m.role = 'assistant')::INTEGER + coalesce(strlen(m.reasoning) + 1, 0)))
        + CASE WHEN d.answer IS NULL THEN 0 ELSE 3 + strlen(d.answer)
            + coalesce(list_sum(list_transform(d.steps, lambda s: strlen(s.content) + 1)) - 1, 0)
          END)::BIGINT""",
}
_COLUMNS = ", ".join(f"{sql} AS {name}" for name, sql in TYPED.items())


def derived(source: str) -> str:
    """A query for whole rows of examples, of a relation with seq, digest and canonical."""
    return f"""SELECT seq, digest, {_COLUMNS}, canonical
               FROM (SELECT seq, digest, canonical, {PARSED} AS d FROM {source})"""


def m002_typed_columns_and_sources(con: duckdb.DuckDBPyConnection) -> None:
    """Typed columns that SQL derives from the canonical text, and where examples came from.

    Texts are stored uncompressed: compressing them costs more than all the rest of an ingest.
    """
    plain = "USING COMPRESSION uncompressed"
    con.execute(
        f"""CREATE TABLE typed (
            seq BIGINT NOT NULL,
            digest VARCHAR NOT NULL {plain},
            prompt VARCHAR NOT NULL {plain},
            split VARCHAR,
            meta VARCHAR NOT NULL {plain},
            steps INTEGER NOT NULL,
            characters BIGINT NOT NULL,
            tokens BIGINT NOT NULL,
            canonical VARCHAR NOT NULL {plain})"""
    )
    con.execute("INSERT INTO typed " + derived("examples"))
    con.execute("DROP TABLE examples")
    con.execute("ALTER TABLE typed RENAME TO examples")
    con.execute("DROP SEQUENCE ingest_order")
    con.execute(
        f"""CREATE TABLE member (
            key VARCHAR NOT NULL,
            position BIGINT NOT NULL,
            digest VARCHAR NOT NULL {plain},
            split VARCHAR NOT NULL)"""
    )
    con.execute("INSERT INTO member SELECT * FROM members")
    con.execute("DROP TABLE members")
    con.execute("ALTER TABLE member RENAME TO members")
    con.execute("CREATE TABLE sources (key VARCHAR NOT NULL, document VARCHAR NOT NULL)")


MIGRATIONS: tuple[Callable[[duckdb.DuckDBPyConnection], None], ...] = (
    m001_examples_and_manifests,
    m002_typed_columns_and_sources,
)


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
