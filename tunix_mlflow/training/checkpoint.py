"""Checkpoints: Orbax behind one module, each one sealed by a manifest of our own.

    checkpoints/00000100/state/           written by Orbax, in the background
    checkpoints/00000100/manifest.json    written last: size and sha256 of every file

A checkpoint without its manifest does not exist. Orbax does not notice a flipped bit, so all files
are compared with the manifest before they are restored; a damaged checkpoint is moved to
quarantine/, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from tunix_mlflow.config.schema import CheckpointsConfig
from tunix_mlflow.errors import CheckpointError, IntegrityError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.models import arrays

STATE = "state"
QUARANTINE, SUPERSEDED = "quarantine", "superseded"
NUMERICS_KEY = "numerics"
_DELETING = ".deleting-"
_ORBAX_TMP = ".orbax-checkpoint-tmp"
_T = TypeVar("_T")


class Retention(NamedTuple):
    """Which checkpoints are kept."""

    keep_last: int
    keep_best: int = 0
    metric: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    every_steps: int = 0  # multiples of it are never deleted; 0: none

    @classmethod
    def of(cls, config: CheckpointsConfig) -> Retention:
        """Return what a configuration asks for."""
        return cls(
            config.keep_last, config.keep_best, config.metric, config.mode, config.keep_every_steps
        )


def to_delete(
    checkpoints: Sequence[tuple[int, Mapping[str, float]]], retention: Retention
) -> list[int]:
    """Return the steps that may be deleted, in ascending order; never the newest.

    Args:
        checkpoints: step and metrics of each.
        retention: what is kept. Of equally good ones the newer counts as the better; one without
            the metric, or with a NaN, is none of the best.
    """
    steps = sorted(step for step, _ in checkpoints)
    kept = set(steps[max(0, len(steps) - max(1, retention.keep_last)) :])
    if retention.every_steps:
        kept |= {step for step in steps if step % retention.every_steps == 0}
    sign = 1 if retention.mode == "min" else -1
    scored = [
        (sign * metrics[retention.metric], -step)
        for step, metrics in checkpoints
        if not math.isnan(metrics.get(retention.metric, math.nan))
    ]
    kept |= {-step for _, step in sorted(scored)[: retention.keep_best]}
    return [step for step in steps if step not in kept]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live.
        identity: digests and fingerprint; part of every manifest, compared when restoring.
        retention: which are kept; older ones are deleted once the next is sealed.
        on_sealed: called with folder and step, in the background, for example to upload.
        on_removed: called with the step of one that was deleted, after `on_sealed` of the next.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        *,
        retention: Retention,
        on_sealed: Callable[[Path, int], None] | None = None,
        on_removed: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.identity, self.retention = folder, dict(identity), retention
        self.on_sealed, self.on_removed = on_sealed, on_removed
        self._orbax = arrays.checkpointer()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Start to write; return when the arrays are copied, before they are on the disk.

        A step that is sealed already is left as it is.

        Args:
            step: updates done.
            state: the caller may donate its arrays afterwards.
            metrics: of this state, for `Retention.keep_best`.

        Raises:
            UnavailableError: if the save before this one failed, for example on a full disk.
        """
        self.wait()
        folder = self.folder / f"{step:08d}"
        try:
            if (folder / arrays.MANIFEST).exists():
                return
            for left in leftovers(self.folder):
                shutil.rmtree(left)
            folder.mkdir(parents=True)
            copy = jax.tree.map(lambda leaf: np.array(leaf), state)
            self._orbax.save((folder / STATE).absolute(), arrays.flatten(state))
        except (OSError, ValueError) as error:  # Orbax's storage says ValueError for some
            self._renew()
            raise _failed("write", folder, error) from error
        content = {
            "step": step,
            "identity": self.identity,
            "metrics": {k: v for k, v in (metrics or {}).items() if math.isfinite(v)},
        }
        self._pending = folder, self._worker.submit(self._finish, folder, content, copy)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UnavailableError: if the last save failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        folder, written = pending
        try:
            written.result()
        except (OSError, ValueError) as error:
            self._renew()
            raise _failed("write", folder, error) from error

    def close(self) -> None:
        """Wait, and end the threads.

        Raises:
            UnavailableError: as :meth:`wait`.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._close_orbax()

    def restore_latest(self, target: _T, report: Callable[[str], None]) -> tuple[int, _T] | None:
        """Return the newest checkpoint whose files are what its manifest says.

        Args:
            target: a state of the right structure.
            report: receives a line for each checkpoint that is moved to quarantine.

        Returns:
            The step and the state, or None when there is no checkpoint.

        Raises:
            CheckpointError: if it was made with other data, another model, optimizer or version of
                our numerics.
            UnavailableError: if a damaged one cannot be moved.
            IntegrityError: if it does not hold the state that was saved.
        """
        for folder in reversed(sealed_checkpoints(self.folder)):
            try:
                manifest = arrays.check(folder)
            except IntegrityError as error:
                _quarantine(folder, QUARANTINE)
                report(f"{error}; moved to {QUARANTINE}/, the checkpoint before it is used")
                continue
            return int(manifest["step"]), self._read(folder, manifest, target)
        return None

    def restore(self, step: int, target: _T) -> _T:
        """Return the checkpoint of one step.

        Raises:
            CheckpointError: if there is none, or it was made with something else.
            IntegrityError: if it is damaged.
        """
        folder = self._of(step)
        return self._read(folder, arrays.check(folder), target)

    def rewind(self, step: int) -> None:
        """Move the checkpoints after `step` to superseded/, so that training resumes from there.

        Raises:
            CheckpointError: if there is no checkpoint of that step.
            UnavailableError: if a later one cannot be moved.
        """
        self._of(step)
        for folder in sealed_checkpoints(self.folder):
            if int(folder.name) > step:
                _quarantine(folder, SUPERSEDED)

    def _of(self, step: int) -> Path:
        folder = self.folder / f"{step:08d}"
        if folder not in sealed_checkpoints(self.folder):
            have = (
                ", ".join(str(int(path.name)) for path in sealed_checkpoints(self.folder)) or "none"
            )
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.folder}: {have}")
        return folder

    def _read(self, folder: Path, manifest: Mapping[str, Any], target: _T) -> _T:
        for name, value in self.identity.items():
            stored = manifest["identity"].get(name)
            if name.endswith("_digest") and stored != value:
                raise CheckpointError(
                    f"{folder} was made with another {name.removesuffix('_digest')}:"
                    f" {str(stored)[:16]}, now {value[:16]}; start a new run"
                )
            if name == NUMERICS_KEY and stored != value:
                raise CheckpointError(
                    f"{folder} was made by version {stored} of our numerics, and this is version"
                    f" {value}: the run would not be the same; begin a new run there with --fork"
                )
        restored = arrays.read(folder / STATE, target)
        if manifest["state_digest"] != arrays.digest(restored):
            raise IntegrityError(f"{folder} does not hold the state that was saved")
        return restored

    def _finish(self, folder: Path, content: Mapping[str, Any], copy: Any) -> None:
        self._orbax.wait_until_finished()
        arrays.seal(folder, {**content, "state_digest": arrays.digest(copy)})
        if self.on_sealed is not None:
            self.on_sealed(folder, content["step"])
        for step in to_delete(
            [(int(p.name), _metrics(p)) for p in sealed_checkpoints(self.folder)], self.retention
        ):
            old = self.folder / f"{step:08d}"
            try:
                remove(old)
            except OSError as error:
                raise _failed("delete", old, error) from error
            if self.on_removed is not None:
                self.on_removed(step)

    def _renew(self) -> None:
        """Replace the checkpointer after a failed save: it would raise the rest at the next one."""
        self._close_orbax()
        self._orbax = arrays.checkpointer()

    def _close_orbax(self) -> None:
        for close in (self._orbax.wait_until_finished, self._orbax.close):
            with contextlib.suppress(OSError, ValueError):  # of a failed save, raised already
                close()


def sealed_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of sealed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.isdigit() and (path / arrays.MANIFEST).exists()
    )


def leftovers(folder: Path) -> list[Path]:
    """Return what a killed process left among checkpoints: torn saves, and what it was deleting."""
    sealed = sealed_checkpoints(folder)
    return [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_dir()
        and (
            (path.name.isdigit() and path not in sealed)
            or path.name.startswith(_DELETING)
            or _ORBAX_TMP in path.name
        )
    ]


def remove(folder: Path) -> None:
    """Delete a checkpoint; a kill meanwhile leaves nothing that counts as one."""
    renamed = folder.with_name(f"{_DELETING}{folder.name}")
    if renamed.exists():  # left by a kill
        shutil.rmtree(renamed)
    folder.rename(renamed)
    shutil.rmtree(renamed)


def _metrics(folder: Path) -> Mapping[str, float]:
    """Return the metrics of a sealed checkpoint; none if its manifest is damaged."""
    try:
        metrics: Mapping[str, float] = arrays.content(folder).get("metrics", {})
    except IntegrityError:
        return {}
    return metrics


def _quarantine(folder: Path, name: str) -> None:
    parent = folder.parent / name
    index = 0
    try:
        parent.mkdir(exist_ok=True)
        while (parent / f"{folder.name}.{index}").exists():
            index += 1
        folder.rename(parent / f"{folder.name}.{index}")
    except OSError as error:
        raise _failed(f"move to {name}/", folder, error) from error


def _failed(what: str, folder: Path, error: OSError | ValueError) -> UnavailableError:
    return UnavailableError(
        f"cannot {what} the checkpoint {folder}: {_reason(error)};"
        f" {_free(folder) // 2**20} MiB are free there"
    )


def _reason(error: OSError | ValueError) -> str:
    """Return the reason in a few words; Orbax's storage hides the error number in a long text."""
    text = " ".join(str(error).split())
    number = re.search(r"os_error_code='(\d+)'", text)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return os.strerror(int(number[1])) if number else one_line(error, 300)


def _free(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be."""
    for path in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
    return 0
