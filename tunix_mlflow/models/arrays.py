"""Folders of arrays on disk: Orbax inside, sealed by a manifest of our own.

Orbax does not notice a flipped bit, so a sealed folder carries `manifest.json`, written
last, with size and sha256 of every file, and is checked before it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from tunix_mlflow.errors import IntegrityError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
_T = TypeVar("_T")


def checkpointer() -> ocp.StandardCheckpointer:
    """Orbax's. It is loaded here, which takes a fifth of a second: a step is compiled meanwhile."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def flatten(tree: Any) -> dict[str, Any]:
    """A pytree as one flat dict, from the path of each leaf to the leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(tree: Any) -> str:
    """sha256 (64 hex) of names, shapes, types and bytes: equal arrays, equal digest."""
    hasher = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        hasher.update(f"{name}|{array.shape}|{array.dtype}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def write(folder: Path, tree: Any) -> None:
    """Write a pytree with Orbax and wait for it."""
    with checkpointer() as orbax:
        orbax.save(folder.absolute(), flatten(tree))
        orbax.wait_until_finished()


def read(folder: Path, target: _T) -> _T:
    """Read what :func:`write` wrote into the structure of `target`.

    Args:
        folder: as written.
        target: a pytree of arrays, whose places are taken over, or ShapeDtypeStructs.

    Raises:
        IntegrityError: if names, shapes or types differ, naming the first that does.
    """
    wanted = flatten(target)
    device = jax.numpy.zeros(()).device  # where arrays go by default
    default = jax.sharding.SingleDeviceSharding(device)
    with checkpointer() as orbax:
        stored = {
            name: (tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in orbax.metadata(folder.absolute()).item_metadata.items()
        }
        for name in sorted({*stored, *wanted}):
            have = stored.get(name)
            want = (tuple(wanted[name].shape), str(wanted[name].dtype)) if name in wanted else None
            if have != want:
                raise IntegrityError(
                    f"{folder} does not fit this configuration: {name} is {have}, expected {want}"
                )
        abstract = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
            )
            for name, leaf in wanted.items()
        }
        restored = orbax.restore(folder.absolute(), abstract)
    structure = jax.tree_util.tree_structure(target)
    made: _T = jax.tree_util.tree_unflatten(structure, [restored[name] for name in wanted])
    return made


def seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, atomically: name, size and sha256 of each file."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    body = {**content, "files": files}
    text = json.dumps({**body, "digest": _digest(body)}, sort_keys=True, indent=1)
    temporary = folder / f".{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(folder / MANIFEST)


def content(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says; its files are not looked at.

    Raises:
        IntegrityError: if it is missing, or not what was written.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        written = manifest.pop("digest")
        dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / MANIFEST} is missing or damaged") from error
    if written != _digest(manifest):
        raise IntegrityError(f"{folder / MANIFEST} is damaged")
    return manifest


def check(folder: Path) -> dict[str, Any]:
    """Compare a folder with its manifest.

    Returns:
        The manifest's content.

    Raises:
        IntegrityError: naming the first file that is missing, unknown or changed.
    """
    manifest = content(folder)
    files = manifest["files"]
    present = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    for name in sorted({*files, *present}):
        if name not in present:
            raise IntegrityError(f"{folder / name} is missing")
        if name not in files:
            raise IntegrityError(f"{folder / name} is not in the manifest")
        size = present[name].stat().st_size
        if size != files[name]["size"] or _sha256(present[name]) != files[name]["sha256"]:
            raise IntegrityError(f"{folder / name} is not what was written")
    return manifest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
