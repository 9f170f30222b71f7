"""A marker: a process of this machine has a run open, or ended before MLflow knew the run's status.

It is there from before MLflow hears of a run, and names the run by the owner of its lease, so that
a run is found whose process died before it had a folder. The kernel's lock on the file goes with
the process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from tunix_mlflow import paths
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime import memory
from tunix_mlflow.runtime.waiting import try_lock, wait_for

_WAIT_SECONDS = 120.0


class About(Struct, frozen=True):
    """The content of a marker."""

    tracking_uri: str  # without credentials
    experiment_id: str | None = None
    folder: str | None = None  # name of the run's folder; None: as MLflow's id, not known yet
    oom_kills: dict[str, int] = {}  # before it began; see runtime.memory


class Marker:
    """A marker that this process holds."""

    def __init__(self, owner: str, handle: int) -> None:
        self.owner, self._handle = owner, handle

    def release(self, *, remove: bool) -> None:
        """Let it go; a second call does nothing. In a forked process it stays the parent's.

        Args:
            remove: MLflow knows how the run ended, or has none.
        """
        handle, self._handle = self._handle, -1
        if handle < 0:
            return
        if remove:
            with contextlib.suppress(OSError):
                (paths.open_runs() / self.owner).unlink(missing_ok=True)
        os.close(handle)


def place(owner: str, about: About) -> Marker:
    """Place a marker, before MLflow hears of a run.

    Args:
        owner: of the run's lease.
        about: the run.

    Raises:
        UnavailableError: if the disk cannot be written, or another process holds the marker.
    """
    path = paths.open_runs() / owner
    about = msgspec.structs.replace(about, oom_kills=memory.oom_kills())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(path)
        os.ftruncate(handle, 0)
        os.write(handle, msgspec.json.encode(about))
    except OSError as error:
        raise UnavailableError(f"cannot write {path}: {one_line(error)}") from error
    return Marker(owner, handle)


def abandoned() -> Iterator[tuple[Marker, About | None]]:
    """Yield the markers whose processes are gone, each held until the next one is asked for.

    None: it is damaged, or its process died before it had said what it is about, and before MLflow
    heard of the run.
    """
    folder = paths.open_runs()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # its process has just removed it
            continue
        if not try_lock(handle):
            os.close(handle)
            continue
        try:
            about = msgspec.json.decode(os.read(handle, 1 << 16), type=About)
        except (msgspec.DecodeError, UnicodeDecodeError):
            about = None
        held = Marker(path.name, handle)
        try:
            yield held, about
        finally:
            held.release(remove=False)


def _open_locked(path: Path) -> int:
    """Return a handle of a file, made if it is not there, that this process has locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Another command may be looking at it.
            wait_for(partial(try_lock, handle), f"the marker {path}", _WAIT_SECONDS, file=path)
        except BaseException:
            os.close(handle)
            raise
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # that command has deleted it
