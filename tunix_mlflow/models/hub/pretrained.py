"""Read and write models in Hugging Face's layout: config.json, and safetensors, sharded or not.

Tensors are read one by one, each into its dtype and on its device. Nothing in a folder is
executed, and no tensor is ignored silently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.errors import ModelError
from tunix_mlflow.files import failure, one_line
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.models.hub import families, names
from tunix_mlflow.models.hub.names import Array

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 2 * 2**30
_IGNORED = ".rotary_emb.inv_freq"  # in old files, though the configuration determines it
_DTYPES = {"F32", "F16", "BF16", "F64"}


class Source(NamedTuple):
    """An opened model: its configuration and tensors."""

    where: str
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # by transformers' names
    read: Callable[[str], Array]


def resolve(folder: Path) -> Path:
    """Return the folder that has config.json: `folder`, or the snapshot in a hub cache's folder.

    Raises:
        ModelError: if there is none.
    """
    if (folder / CONFIG).is_file():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text().strip()
        if (snapshot / CONFIG).is_file():
            return snapshot
    snapshots = sorted(folder.glob(f"snapshots/*/{CONFIG}"))
    if len(snapshots) == 1:
        return snapshots[0].parent
    if not folder.exists():
        raise ModelError(f"there is no {folder}")
    raise ModelError(
        f"{folder} has no {CONFIG}: give the folder of a model in Hugging Face's layout"
    )


def config_of(folder: Path) -> ModelConfig:
    """Return the decoder's configuration that a folder's config.json describes.

    Raises:
        ModelError: if it cannot be read, or is not implemented.
    """
    path = folder / CONFIG
    return families.read(read_json(path), str(path))


@contextmanager
def opened(folder: Path) -> Iterator[Source]:
    """Open the model in a folder.

    Raises:
        ModelError: if a file is missing or damaged, or the model is not implemented.
    """
    from safetensors import SafetensorError, safe_open

    config = config_of(folder)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(folder):
            try:
                # The reader in Rust checks offsets and lengths, and maps the file.
                file = stack.enter_context(safe_open(path, framework="np"))
                for name in file.keys():  # noqa: SIM118  not a mapping
                    tensor = file.get_slice(name)
                    if name in files:
                        raise ModelError(f"{path}: {name} is in another shard as well")
                    if tensor.get_dtype() not in _DTYPES:
                        kind = tensor.get_dtype()
                        raise ModelError(f"{path}: {name} is {kind}; only floats are implemented")
                    if not name.endswith(_IGNORED):
                        files[name], shapes[name] = file, tuple(tensor.get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is damaged or missing: {one_line(error)}") from error
        _check_index(folder, set(files))

        def read(name: str) -> Array:
            try:
                return np.asarray(files[name].get_tensor(name))
            except SafetensorError as error:
                raise ModelError(f"{folder}: {name} is damaged: {one_line(error)}") from error

        yield Source(str(folder), config, shapes, read)


def load(source: Source, vocab_size: int, put: Callable[[Array, Any], Any]) -> Params:
    """Read the parameters of a model as float32, one after the other.

    Args:
        source: from :func:`opened`.
        vocab_size: rows of the embedding.
        put: returns an array on its device, given the shape and dtype of its leaf.

    Raises:
        ModelError: naming a tensor that is missing, unknown or of another shape.
    """
    like = decoder.shape(source.config, vocab_size)[1]
    shapes = dict(source.shapes)
    if source.config.tie_embeddings and names.OUTPUT in shapes:
        if not np.array_equal(source.read(names.OUTPUT), source.read(names.TABLE)):
            raise ModelError(
                f"{source.where}: {names.OUTPUT} is not {names.TABLE}, though the two are tied"
            )
        del shapes[names.OUTPUT]
    return names.from_names(shapes, source.read, like, source.config, source.where, put)


def on_device(device: jax.Device) -> Callable[[Array, Any], Any]:
    """Return a `put` function for one device."""
    return lambda array, _: jax.device_put(array, device)


def save(
    folder: Path,
    config: ModelConfig,
    params: Params,
    *,
    files: Mapping[str, bytes] | None = None,
    tokens: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a model in Hugging Face's layout, in shards of 2 GB; the folder must not exist.

    Args:
        folder: to create.
        config: of the model.
        params: of the plain form, without adapters.
        files: tokenizer and template, by name.
        tokens: `bos_token_id` and the like, for config.json.
        dtype: of the tensors.

    Raises:
        ModelError: if the folder exists.
    """
    from safetensors.numpy import save_file

    with new_folder(folder) as scratch:
        leaves = names.named(params, config)
        vocab_size = leaves[names.TABLE].shape[0]
        tree = families.write(config, vocab_size) | {"dtype": dtype} | dict(tokens or {})
        (scratch / CONFIG).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
        shards = _shard_names(leaves, np.dtype(jax.numpy.dtype(dtype)).itemsize)
        listed: dict[str, str] = {}
        for number, group in enumerate(shards, start=1):
            file = WEIGHTS
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {
                name: np.ascontiguousarray(names.transposed(name, np.asarray(leaves[name])), dtype)
                for name in group
            }
            save_file(tensors, scratch / file, metadata={"format": "pt"})
            listed |= dict.fromkeys(group, file)
        if len(shards) > 1:
            size = sum(leaf.size for leaf in leaves.values()) * np.dtype(dtype).itemsize
            index = {"metadata": {"total_size": size}, "weight_map": listed}
            (scratch / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for name, content in (files or {}).items():
            (scratch / name).write_bytes(content)


def require_absent(folder: Path) -> None:
    """Raise an error if a folder exists.

    Raises:
        ModelError: if it exists.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists; give a folder that does not")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the block succeeds.

    Raises:
        ModelError: if `folder` exists or cannot be written.
    """
    require_absent(folder)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise failure(error, f"cannot write {folder}", ModelError) from error
    try:
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder.

    Raises:
        ModelError: if it is missing, or holds no object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds no object")
    return tree


def _shard_names(leaves: Mapping[str, Any], item: int) -> list[list[str]]:
    """Return the names of the tensors of each shard."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, leaf in leaves.items():
        if groups[-1] and size + leaf.size * item > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += leaf.size * item
    return groups


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        listed = sorted(set(_weight_map(folder).values()))
        return [folder / name for name in listed]
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    return [folder / WEIGHTS]


def _weight_map(folder: Path) -> dict[str, str]:
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or any(Path(str(v)).name != v for v in files.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map of files beside it")
    return files


def _check_index(folder: Path, present: set[str]) -> None:
    """Compare the tensors of the shards with their index."""
    if not (folder / INDEX).is_file():
        return
    listed = {name for name in _weight_map(folder) if not name.endswith(_IGNORED)}
    for name in sorted(listed ^ present):
        reason = "is not in its shard" if name in listed else "is not in the index"
        raise ModelError(f"{folder}: {name} {reason}")
