"""Checkpoints: Orbax behind one module, each one sealed by a manifest of our own.

    checkpoints/00000100/state/           written by Orbax, in the background
    checkpoints/00000100/manifest.json    written last: size and sha256 of every file

A checkpoint without its manifest does not exist. Orbax does not notice a flipped bit, so
everything is compared with the manifest before it is restored; what does not agree is
moved to quarantine/, and the one before it is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from tunix_mlflow.errors import CheckpointError, IntegrityError
from tunix_mlflow.models import arrays

STATE = "state"
QUARANTINE = "quarantine"
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live.
        identity: digests and fingerprint; part of every manifest, compared when restoring.
        keep_last: older ones are deleted once the next is sealed.
        on_sealed: called with folder and step, in the background, for example to upload.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        *,
        keep_last: int,
        on_sealed: Callable[[Path, int], None] | None = None,
    ) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.keep_last, self.on_sealed = keep_last, on_sealed
        self._orbax = ocp.StandardCheckpointer()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Any) -> None:
        """Start writing; returns when the arrays are copied, before they are on disk.

        A step that is sealed already is left as it is.

        Raises:
            CheckpointError: if the save before this one failed, for example on a full disk.
        """
        self.wait()
        folder = self.folder / f"{step:08d}"
        if (folder / arrays.MANIFEST).exists():
            return  # sealed already; what is safe is never written again
        try:
            if folder.exists():
                shutil.rmtree(folder)  # what a killed save left
            folder.mkdir(parents=True)
            self._orbax.save((folder / STATE).absolute(), arrays.flatten(state))
        except OSError as error:
            raise self._failed(folder, error) from error
        self._pending = self._worker.submit(self._finish, step, folder)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: if the last save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except OSError as error:
                raise self._failed(self.folder, error) from error

    def close(self) -> None:
        """Wait, and let the threads go.

        Raises:
            CheckpointError: as :meth:`wait`.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def restore_latest(self, target: _T, report: Callable[[str], None]) -> tuple[int, _T] | None:
        """The newest checkpoint that its manifest vouches for.

        Args:
            target: a state of the right structure.
            report: told of each checkpoint that is put into quarantine.

        Returns:
            The step and the state, or None when there is no checkpoint to go on from.

        Raises:
            CheckpointError: if it was made of other data, another model or optimizer.
        """
        for folder in reversed(steps(self.folder)):
            try:
                manifest = arrays.check(folder)
            except IntegrityError as error:
                report(f"{error}; moved to {QUARANTINE}/, the checkpoint before it is used")
                _quarantine(folder)
                continue
            self._compare(folder, manifest["identity"])
            return int(manifest["step"]), arrays.read(folder / STATE, target)
        return None

    def _finish(self, step: int, folder: Path) -> None:
        self._orbax.wait_until_finished()
        arrays.seal(folder, {"step": step, "identity": self.identity})
        for old in steps(self.folder)[: -self.keep_last]:
            doomed = old.with_name(f".deleting-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)
        if self.on_sealed is not None:
            self.on_sealed(folder, step)

    def _compare(self, folder: Path, stored: Mapping[str, str]) -> None:
        for name, value in self.identity.items():
            if name.endswith("_digest") and stored.get(name) != value:
                raise CheckpointError(
                    f"{folder} was made with another {name.removesuffix('_digest')}:"
                    f" {str(stored.get(name))[:16]}, now {value[:16]}; start a new run"
                )

    def _failed(self, folder: Path, error: OSError) -> CheckpointError:
        free = shutil.disk_usage(self.folder if self.folder.exists() else Path.cwd()).free
        return CheckpointError(
            f"cannot write the checkpoint {folder}: {error.strerror or error};"
            f" {free // 2**20} MiB are free there"
        )


def steps(folder: Path) -> list[Path]:
    """Sealed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.isdigit() and (path / arrays.MANIFEST).exists()
    )


def _quarantine(folder: Path) -> None:
    place = folder.parent / QUARANTINE
    place.mkdir(exist_ok=True)
    number = 0
    while (place / f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(place / f"{folder.name}.{number}")
