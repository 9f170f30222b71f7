"""Files, for everybody: atomic writes, sha256 of a file, an error in one line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds.

    A reader sees the old file or the new one, never a part. The new file is on the disk before it
    is visible.

    Raises:
        OSError: if it cannot be written; `path` is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file; see :func:`replacing`."""
    with replacing(path) as part:
        part.write_bytes(data)


def sha256_file(path: Path) -> str:
    """Return the sha256 (64 hex) of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def one_line(error: BaseException, limit: int = 500) -> str:
    """Return an error's message on one line of at most `limit` characters.

    Of an error of the operating system only its reason, without number and path; of an error
    without a message the name of its type.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:limit] or type(error).__name__
