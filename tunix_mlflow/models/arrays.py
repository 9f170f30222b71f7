"""Folders of arrays on disk: written by Orbax, sealed by a manifest of our own.

Orbax does not detect a flipped bit, so a sealed folder has `manifest.json`, written last, with
size and sha256 of every file, and is checked before it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from tunix_mlflow.errors import IntegrityError
from tunix_mlflow.files import sha256_file, write_atomically

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
_T = TypeVar("_T")


def checkpointer() -> ocp.StandardCheckpointer:
    """Return Orbax's checkpointer.

    Orbax takes a fifth of a second to import, so it is imported here, while a step compiles.
    """
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def flatten(tree: Any) -> dict[str, Any]:
    """Return a pytree as one flat dict, from the path of each leaf to the leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(tree: Any) -> str:
    """Return the sha256 (64 hex) of names, shapes, dtypes and bytes."""
    hasher = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        hasher.update(f"{name}|{array.shape}|{array.dtype}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def write(folder: Path, tree: Any) -> None:
    """Write a pytree with Orbax and wait until it is written."""
    with checkpointer() as orbax:
        orbax.save(folder.absolute(), flatten(tree))
        orbax.wait_until_finished()


def read(folder: Path, target: _T) -> _T:
    """Read what :func:`write` wrote into the structure of `target`.

    Args:
        folder: that was written.
        target: a pytree of arrays, whose shardings are used, or of ShapeDtypeStructs.

    Raises:
        IntegrityError: if names, shapes or dtypes differ, naming the first that does.
    """
    expected = flatten(target)
    device = jax.numpy.zeros(()).device  # where arrays go by default
    default = jax.sharding.SingleDeviceSharding(device)
    with checkpointer() as orbax:
        stored = {
            name: (tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in orbax.metadata(folder.absolute()).item_metadata.items()
        }
        for name in sorted({*stored, *expected}):
            leaf = expected.get(name)
            want = None if leaf is None else (tuple(leaf.shape), str(leaf.dtype))
            if stored.get(name) != want:
                raise IntegrityError(
                    f"{folder} does not fit this configuration: {name} is {stored.get(name)},"
                    f" expected {want}"
                )
        abstract = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
            )
            for name, leaf in expected.items()
        }
        restored = orbax.restore(folder.absolute(), abstract)
    structure = jax.tree_util.tree_structure(target)
    result: _T = jax.tree_util.tree_unflatten(structure, [restored[name] for name in expected])
    return result


def seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, atomically: name, size and sha256 of each file."""
    files = {
        name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in _files(folder).items()
    }
    body = {**content, "files": files}
    text = json.dumps({**body, "digest": _digest(body)}, sort_keys=True, indent=1)
    write_atomically(folder / MANIFEST, text.encode())


def content(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's manifest, without a check of the files.

    Raises:
        IntegrityError: if it is missing or damaged.
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
    """Compare the files of a folder with its manifest.

    Returns:
        The manifest's content.

    Raises:
        IntegrityError: naming the first file that is missing, unknown or changed.
    """
    manifest = content(folder)
    files = manifest["files"]
    present = _files(folder)
    for name in sorted({*files, *present}):
        if name not in present:
            raise IntegrityError(f"{folder / name} is missing")
        if name not in files:
            raise IntegrityError(f"{folder / name} is not in the manifest")
        size = present[name].stat().st_size
        if size != files[name]["size"] or sha256_file(present[name]) != files[name]["sha256"]:
            raise IntegrityError(f"{folder / name} is not what was written")
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder beside its manifest, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
