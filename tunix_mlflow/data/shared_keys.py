"""A team's names: which dataset a key stands for, beside the snapshots of a shared root.

    keys/KEY.json     {"digest", "key"}, created once and never changed

Only with TUNIX_MLFLOW_SNAPSHOTS. A key is claimed when its dataset is stored or first used: of two
who claim it with different datasets one wins, and the other is told both digests; on a file system
that cannot create a file exclusively, when it is used next. Whoever has the root uses the dataset
by its key, without a catalog.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from fsspec.implementations.local import LocalFileSystem
from msgspec import Struct

from tunix_mlflow import paths
from tunix_mlflow.data import snapshot
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError, TunixMlflowError, UnavailableError
from tunix_mlflow.files import one_line

_FOLDER = "keys"


class _Claim(Struct, frozen=True):
    digest: str
    key: str


def claim(manifest: Manifest) -> None:
    """Publish the key of a dataset, once; without a shared root do nothing.

    Raises:
        DatasetError: if the key stands for another dataset.
        UnavailableError: if the root cannot be written to.
    """
    if not _is_shared():
        return
    content = msgspec.json.encode(_Claim(manifest.digest, manifest.key))
    with _failures(f"cannot claim {manifest.key}"):
        system, path = _place(manifest.key)
        if not system.exists(path):
            with contextlib.suppress(FileExistsError):
                _create(system, path, content)
        digest = _read(system, path).digest
    if digest != manifest.digest:
        raise DatasetError(
            f"dataset {manifest.key} has digest {digest[:16]} in {paths.snapshot_root()}, and this"
            f" one has {manifest.digest[:16]}: give it a new version"
        )


def find(key: str) -> str | None:
    """Return the digest of the dataset that a key stands for; None if nobody has claimed it.

    Raises:
        UnavailableError: if the root cannot be read.
    """
    if not _is_shared():
        return None
    with _failures(f"cannot look for {key}"):
        system, path = _place(key)
        return _read(system, path).digest if system.exists(path) else None


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn what goes wrong with the root into an UnavailableError."""
    try:
        yield
    except TunixMlflowError:
        raise
    except Exception as error:  # each file system has errors of its own
        reason = one_line(error, 300)
        raise UnavailableError(f"{what} in {paths.snapshot_root()}: {reason}") from error


def _is_shared() -> bool:
    return bool(os.environ.get(paths.SNAPSHOTS_VARIABLE))


def _place(key: str) -> tuple[Any, str]:
    system, path = snapshot.file_system()
    return system, f"{path}/{_FOLDER}/{key}.json"


def _create(system: Any, path: str, content: bytes) -> None:
    """Write a file that is not there yet, whole.

    Raises:
        FileExistsError: if it is.
    """
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    if isinstance(system, LocalFileSystem):
        part = Path(f"{path}.{uuid.uuid4().hex}.part")
        part.write_bytes(content)
        try:
            os.link(part, path)  # only one of several can
        finally:
            part.unlink()
        return
    try:
        # Object stores create an object on condition that there is none; see their packages.
        with system.open(path, "xb") as out:
            out.write(content)
    except (NotImplementedError, ValueError):  # this one cannot: of two at once the last one stays
        system.pipe_file(path, content)


def _read(system: Any, path: str) -> _Claim:
    try:
        return msgspec.json.decode(system.cat_file(path), type=_Claim)
    except msgspec.DecodeError as error:
        raise DatasetError(f"{path} is damaged: {error}") from error
