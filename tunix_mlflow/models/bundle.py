"""A model with what it takes to use it, as a folder of Orbax arrays and JSON: never code.

bundle.json      shape, tokenizer, template, digests
params/          Orbax
manifest.json    size and sha256 of every file, written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec

from tunix_mlflow.config import ModelConfig
from tunix_mlflow.data import canonical, chat
from tunix_mlflow.data.examples import Example, Message
from tunix_mlflow.data.tokenizer import ByteTokenizer
from tunix_mlflow.errors import IntegrityError
from tunix_mlflow.models import arrays, decoder, generation
from tunix_mlflow.models.decoder import Graph, Params

_INFO = "bundle.json"
_PARAMS = "params"


class Bundle(NamedTuple):
    """A decoder ready to answer."""

    config: ModelConfig
    graph: Graph
    params: Params
    tokenizer: ByteTokenizer
    max_new_tokens: int  # the default length of a completion

    def complete(
        self, examples: Sequence[Example], max_new_tokens: int | None = None
    ) -> list[tuple[str, str | None]]:
        """Greedy completions of the prompts of `examples`: text, and the answer in it."""
        prompts = [self.tokenizer.encode(chat.render_prompt(e))[0] for e in examples]
        made = generation.generate(
            self.graph,
            self.params,
            prompts,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            eos_ids=(self.tokenizer.eos_id,),
            pad_id=self.tokenizer.pad_id,
        )
        return [(self.tokenizer.decode(ids), self.tokenizer.answer(ids)) for ids in made]


def prompt(text: str) -> Example:
    """A bare prompt as an example without a known answer."""
    return Example(messages=(Message(role="user", content=text),), answer="")


def weights_digest(params: Params) -> str:
    """sha256 (64 hex) of names, shapes, types and bytes: equal weights, equal digest."""
    return arrays.digest(params)


def describe(bundle: Bundle) -> dict[str, Any]:
    """What bundle.json says; it decides, with the code, every answer of the model."""
    return {
        "format": 1,
        "model": msgspec.to_builtins(bundle.config),
        "tokenizer": {"name": bundle.tokenizer.name, "digest": bundle.tokenizer.digest},
        "max_new_tokens": bundle.max_new_tokens,
        "parameters": decoder.parameter_count(bundle.params),
        "weights_digest": weights_digest(bundle.params),
    }


def model_digest(bundle: Bundle) -> str:
    """sha256 (64 hex) of :func:`describe`: equal models, equal digest."""
    return canonical.digest(canonical.encode(describe(bundle)))


def save(bundle: Bundle, folder: Path) -> None:
    """Write the folder; it must not exist."""
    folder.mkdir(parents=True)
    arrays.write(folder / _PARAMS, bundle.params)
    (folder / _INFO).write_text(json.dumps(describe(bundle), indent=1, sort_keys=True))
    arrays.seal(folder, {"format": 1})


def load(folder: Path) -> Bundle:
    """Read a folder that :func:`save` wrote, after every file was checked.

    Raises:
        IntegrityError: if a file, the tokenizer or the weights are not what was saved.
    """
    arrays.check(folder)
    info: dict[str, Any] = json.loads((folder / _INFO).read_text())
    tokenizer = ByteTokenizer()
    if info["tokenizer"] != {"name": tokenizer.name, "digest": tokenizer.digest}:
        raise IntegrityError(
            f"{folder} was made with tokenizer {info['tokenizer']['name']},"
            f" and this version has another {tokenizer.name}"
        )
    config = msgspec.convert(info["model"], ModelConfig)
    graph, target = decoder.shape(config, tokenizer.vocab_size)
    params = arrays.read(folder / _PARAMS, target)
    if weights_digest(params) != info["weights_digest"]:
        raise IntegrityError(f"the weights in {folder} do not have the digest in {_INFO}")
    return Bundle(config, graph, jax.device_put(params), tokenizer, info["max_new_tokens"])
