"""Open the catalog: one DuckDB file below the state root.

It is opened for one operation at a time, under a lock file of our own, and never during training.
Nothing here opens the file as a plain file: that would drop DuckDB's own lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from tunix_mlflow import paths
from tunix_mlflow.data import lock
from tunix_mlflow.data.catalog import migrations
from tunix_mlflow.errors import DatasetError, UnavailableError
from tunix_mlflow.files import failure, is_of_the_disk
from tunix_mlflow.runtime.waiting import wait_for

MEMORY = "384MB"  # DuckDB's own; it spills to the disk beyond


@contextmanager
def connect(path: Path, *, write: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for one operation.

    Raises:
        DatasetError: if the file is damaged, newer than this version, or absent (for reading).
        UnavailableError: if another process held it for too long, or the disk is full.
    """
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise failure(error, f"cannot create {path.parent}", DatasetError) from error
    elif not path.exists():
        raise DatasetError(f"there is no catalog at {path} yet; seed or ingest a dataset first")
    try:
        if not write and _needs_migration(path):
            with connect(path, write=True):
                pass  # it migrates
        with lock.held(path, write=write):
            con = _open(path, write)
            try:
                if write:
                    migrations.migrate(con, path)
                yield con
            finally:
                con.close()
    except OSError as error:
        raise failure(error, f"cannot use {path}", DatasetError) from error
    except duckdb.Error as error:
        first_line = str(error).strip().splitlines()[0]
        kind = UnavailableError if is_of_the_disk(error) else DatasetError
        raise kind(f"{path} cannot be used: {first_line}") from error


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit what the block does, or roll all of it back."""
    con.execute("BEGIN")
    try:
        yield
    except BaseException:
        con.execute("ROLLBACK")
        raise
    con.execute("COMMIT")


def _open(path: Path, write: bool) -> duckdb.DuckDBPyConnection:
    if "?" in str(path):
        raise DatasetError(
            f"DuckDB cannot open {path}, since there is a '?' in it; set {paths.HOME_VARIABLE} to"
            " another folder"
        )
    # Nothing but the file itself: no other file is read or written through SQL.
    config: dict[str, Any] = {
        "enable_external_access": "false",
        "lock_configuration": "true",
        "memory_limit": MEMORY,
        "preserve_insertion_order": "false",
        "temp_directory": str(paths.temporary_dir()),
    }
    opened: list[duckdb.DuckDBPyConnection] = []

    def attempt() -> bool:
        try:
            opened.append(duckdb.connect(str(path), read_only=not write, config=config))
        except duckdb.IOException as error:
            # Another program may hold the file without our lock, a notebook for instance.
            if "could not set lock" not in str(error).lower():
                raise
            return False
        return True

    wait_for(attempt, f"the catalog {path}", lock.WAIT_SECONDS, file=path, longest_pause=0.2)
    return opened[0]


def _needs_migration(path: Path) -> bool:
    with lock.held(path, write=False):
        con = _open(path, False)
        try:
            return bool(migrations.pending(con, path))
        finally:
            con.close()
