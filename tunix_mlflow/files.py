"""Files, for everybody: atomic writes, temporary folders, sha256 of a file, an error in one line.

What is temporary has the machine and the process in its name, so that whoever comes later can tell
what a dead process left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunix_mlflow.errors import TunixMlflowError, UnavailableError

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_TEMPORARY = re.compile(r"\.(?:scratch-([0-9a-f]{6})-(\d+)-.*|.*\.([0-9a-f]{6})-(\d+)\.part)")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_STALE_SECONDS = 24 * 3600  # of another machine's, or when a process id was given again


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds.

    A reader sees the old file or the new one, never a part. The new file is on the disk before it
    is visible.

    Raises:
        OSError: if it cannot be written; `path` is as it was.
    """
    part = path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}.part")
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


def remove_parts(path: Path) -> None:
    """Delete what dead processes left of a file of a user's that they were replacing."""
    for left in leftovers(path.parent):
        if left.name.startswith(f".{path.name}."):
            remove(left)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder, and delete it afterwards.

    Those that dead processes left in `parent` are deleted first.

    Args:
        parent: where; it is made if it is not there.

    Raises:
        OSError: if it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(parent):
        remove(left)
    made = Path(tempfile.mkdtemp(dir=parent, prefix=f".scratch-{_MACHINE}-{os.getpid()}-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Return what dead processes left in a folder of :func:`replacing` and :func:`scratch`."""
    try:
        found = sorted(folder.iterdir())
    except OSError:  # it is not there
        return []
    return [path for path in found if _is_left(path)]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all in a folder; of what is deleted meanwhile none."""
    total = 0
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            total += each.lstat().st_size if each.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is not there, or may not be deleted, is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


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


def failure(error: OSError, message: str, mistake: type[TunixMlflowError]) -> TunixMlflowError:
    """Return what to raise for a file that cannot be written.

    Args:
        error: why.
        message: what cannot be done, without the reason.
        mistake: the error of a user who named a place that cannot be used; a disk that is full or
            fails is no mistake.
    """
    text = f"{message}: {one_line(error)}"
    if is_of_the_disk(error):
        return UnavailableError(f"{text}; free some space, or check the disk, and try again")
    return mistake(text)


def is_of_the_disk(error: Exception) -> bool:
    """Return whether an error, OSError or one with its text, is of a disk that is full or fails."""
    if isinstance(error, OSError):
        return error.errno in _DISK
    return any(os.strerror(number) in str(error) for number in _DISK)


def _is_left(path: Path) -> bool:
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    machine, process = found[1] or found[3], int(found[2] or found[4])
    if machine == _MACHINE and not _is_alive(process):
        return True
    try:
        return time.time() - path.lstat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
