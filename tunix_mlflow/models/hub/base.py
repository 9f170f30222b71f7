"""The pretrained model that a run starts from: find, describe, load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.config.schema import DataConfig, ModelConfig
from tunix_mlflow.errors import ModelError
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.models.hub import gguf_file, pretrained
from tunix_mlflow.models.hub.names import Array
from tunix_mlflow.models.hub.pretrained import Source
from tunix_mlflow.text.hub_tokenizer import HubTokenizer
from tunix_mlflow.text.probes import losses

_EXTRA = "install the extra `pretrained`: pip install 'tunix-mlflow[pretrained]'"


class Base(NamedTuple):
    """A pretrained model whose weights are not read yet."""

    path: Path  # a folder, or a GGUF file
    config: ModelConfig
    tokenizer: HubTokenizer


def find(path: Path) -> Base:
    """Return the model in a folder of Hugging Face's layout, of a hub cache, or in a GGUF file.

    Raises:
        ModelError: if it is missing, damaged, or not implemented.
    """
    try:
        is_gguf = gguf_file.is_gguf(path)
        path = path if is_gguf else pretrained.resolve(path)
        with opened(path) as source:
            config = source.config
        if is_gguf:
            files = gguf_file.tokenizer_files(path)
            tokenizer = HubTokenizer(files, str(path), config.vocab_size)
        else:
            tokenizer = HubTokenizer.read(path, config.vocab_size)
    except ModuleNotFoundError as error:
        raise ModelError(f"{path} cannot be read: no package {error.name}; {_EXTRA}") from error
    return Base(path, config, tokenizer)


def describe(base: Base) -> dict[str, object]:
    """Return what to show of a pretrained model."""
    model = base.config
    return {
        "path": str(base.path),
        "family": model.family,
        "parameters": decoder.parameter_count(decoder.shape(model, model.vocab_size or 0)[1]),
        "layers": model.layers,
        "width": model.width,
        "heads": f"{model.heads} of {model.head_width}, {model.kv_heads} key/value",
        "vocabulary": model.vocab_size,
        "positions": model.max_positions,
        "window": model.window,
        "tokenizer": base.tokenizer.digest[:16],
        "template": base.tokenizer.template_digest(DataConfig())[:16],
        "ends": list(base.tokenizer.eos_ids),
        **{f"rendered {kind}": found for kind, found in losses(base.tokenizer).items()},
    }


def opened(path: Path) -> AbstractContextManager[Source]:
    """Open the weights of a model."""
    return gguf_file.opened(path) if gguf_file.is_gguf(path) else pretrained.opened(path)


def load(base: Base, put: Callable[[Array, Any], Any]) -> tuple[Params, str]:
    """Read the parameters as float32; each is put on its device before the next is read.

    Args:
        base: from :func:`find`.
        put: returns an array on its device, given the shape and dtype of its leaf.

    Returns:
        The parameters, and their digest (64 hex): equal weights, equal digest.

    Raises:
        ModelError: naming the tensor that is missing, unknown, damaged or of another shape.
    """
    hasher = hashlib.sha256()

    def hash_and_put(array: Array, leaf: Any) -> Any:
        hasher.update(f"{array.shape}|{array.dtype}\n".encode())
        hasher.update(array.data)
        return put(array, leaf)

    with opened(base.path) as source:
        params = pretrained.load(source, base.config.vocab_size or 0, hash_and_put)
    return params, hasher.hexdigest()
