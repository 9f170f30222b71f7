"""The pretrained model that a run begins with: found, described, read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.errors import ModelError
from tunix_mlflow.models import decoder
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.models.hub import gguf_file, pretrained
from tunix_mlflow.models.hub.names import Array
from tunix_mlflow.models.hub.pretrained import Source
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

_EXTRA = "it takes the extra `pretrained`: pip install 'tunix-mlflow[pretrained]'"


class Base(NamedTuple):
    """A pretrained model whose weights were not read yet."""

    place: Path  # a folder, or a GGUF file
    config: ModelConfig
    tokenizer: HubTokenizer


def find(place: Path) -> Base:
    """What a folder in Hugging Face's layout, a hub cache's or a GGUF file holds.

    Raises:
        ModelError: if it is missing, damaged, or says what is not implemented.
    """
    try:
        quantized = gguf_file.is_gguf(place)
        place = place if quantized else pretrained.resolve(place)
        with opened(place) as source:
            config = source.config
        if quantized:
            files = gguf_file.tokenizer_files(place)
            tokenizer = HubTokenizer(files, str(place), config.vocab_size)
        else:
            tokenizer = HubTokenizer.read(place, config.vocab_size)
    except ModuleNotFoundError as error:
        raise ModelError(f"{place} cannot be read: no package {error.name}; {_EXTRA}") from error
    return Base(place, config, tokenizer)


def describe(base: Base) -> dict[str, object]:
    """What a pretrained model is, for people."""
    model = base.config
    return {
        "place": str(base.place),
        "family": model.family,
        "parameters": decoder.parameter_count(decoder.shape(model, model.vocab_size or 0)[1]),
        "layers": model.layers,
        "width": model.width,
        "heads": f"{model.heads} of {model.head_width}, {model.kv_heads} key/value",
        "vocabulary": model.vocab_size,
        "positions": model.max_positions,
        "window": model.window,
        "tokenizer": base.tokenizer.digest[:16],
        "template": base.tokenizer.template_digest(True)[:16],
        "ends": list(base.tokenizer.eos_ids),
    }


def opened(place: Path) -> AbstractContextManager[Source]:
    """The weights, to be read."""
    return gguf_file.opened(place) if gguf_file.is_gguf(place) else pretrained.opened(place)


def load(base: Base, place: Callable[[Array, Any], Any]) -> tuple[Params, str]:
    """The parameters, float32, each put in its place as soon as it is read.

    Args:
        base: found.
        place: puts an array, given shape and type of its leaf, where it shall be.

    Returns:
        The parameters, and their digest (64 hex): equal weights, equal digest.

    Raises:
        ModelError: naming what is missing, unknown, damaged or of another shape.
    """
    hasher = hashlib.sha256()

    def noted(array: Array, leaf: Any) -> Any:
        hasher.update(f"{array.shape}|{array.dtype}\n".encode())
        hasher.update(array.data)
        return place(array, leaf)

    with opened(base.place) as source:
        params = pretrained.load(source, base.config.vocab_size or 0, noted)
    return params, hasher.hexdigest()
