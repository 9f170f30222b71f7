"""A model with its tokenizer and limits, as a folder of Orbax arrays and JSON: never code.

bundle.json      model configuration, tokenizer, template, limits, digests
params/          Orbax
tokenizer/       of a pretrained model: tokenizer.json, template and settings
adapter/         Orbax, if the model was trained with LoRA; `params` has it merged already
manifest.json    size and sha256 of every file, written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec

from tunix_mlflow.config.schema import DataConfig, LoraConfig, ModelConfig
from tunix_mlflow.data import canonical
from tunix_mlflow.data.examples import Example, Message, to_answer
from tunix_mlflow.errors import DatasetError, IntegrityError
from tunix_mlflow.models import arrays, decoder, generation, lora
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.text.tokenizer import Tokenizer

_INFO = "bundle.json"
_PARAMS = "params"
_ADAPTER = "adapter"
_TOKENIZER = "tokenizer"


class Adapter(NamedTuple):
    """A LoRA adapter and the base model that it belongs to."""

    config: LoraConfig
    params: Params
    base: str  # path or URI of the base model, as configured
    base_digest: str


class Bundle(NamedTuple):
    """A model ready to complete prompts."""

    config: ModelConfig
    graph: Graph
    params: Params
    tokenizer: Tokenizer
    max_new_tokens: int  # default limit of a completion
    adapter: Adapter | None = None  # merged into `params` already

    def complete(
        self, examples: Sequence[Example], max_new_tokens: int | None = None
    ) -> list[tuple[str, str | None]]:
        """Complete the prompts of `examples` greedily.

        Completions are shorter than the limit where the model's positions allow no more.

        Args:
            examples: whose prompts are completed.
            max_new_tokens: limit of a completion; None: that of the bundle.

        Returns:
            The text of each completion, and the answer in it.

        Raises:
            DatasetError: if a prompt is as long as the model's positions.
        """
        prompts = [self.tokenizer.encode_prompt(e) for e in examples]
        limit = max_new_tokens or self.max_new_tokens
        if self.config.max_positions is not None:
            longest = max(len(prompt) for prompt in prompts)
            limit = min(limit, self.config.max_positions - longest)
            if limit < 1:
                raise DatasetError(
                    f"a prompt has {longest} tokens, and the model has"
                    f" {self.config.max_positions} positions"
                )
        completions = generation.generate(
            self.graph,
            self.params,
            prompts,
            max_new_tokens=limit,
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
        )
        return [
            (self.tokenizer.decode(ids), self.tokenizer.read_answer(ids)) for ids in completions
        ]


def prompt(text: str) -> Example:
    """Return a prompt as an example without a known answer."""
    return to_answer((Message(role="user", content=text),))


def conversation(messages: Sequence[Mapping[str, str]]) -> Example:
    """Return messages, each with role and content, as an example without a known answer.

    Raises:
        DatasetError: if a message has no role or content, or the last is the assistant's.
    """
    try:
        turns = msgspec.convert([dict(m) for m in messages], tuple[Message, ...])
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise DatasetError(f"messages must have role and content: {error}") from error
    if not turns or turns[-1].role == "assistant":
        raise DatasetError("the last message must be one to answer")
    return to_answer(turns)


def weights_digest(params: Params) -> str:
    """Return the sha256 (64 hex) of names, shapes, dtypes and bytes of the parameters."""
    return arrays.digest(params)


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return the content of bundle.json: weights, tokenizer, template and limits.

    With the code it determines every completion.
    """
    tokenizer = bundle.tokenizer
    result = {
        "format": 1,
        "model": msgspec.to_builtins(bundle.config),
        "tokenizer": {
            "name": tokenizer.name,
            "digest": tokenizer.digest,
            "template_digest": tokenizer.template_digest(DataConfig()),
        },
        "max_new_tokens": bundle.max_new_tokens,
        "parameters": decoder.parameter_count(bundle.params),
        "weights_digest": weights_digest(bundle.params),
    }
    if bundle.adapter is not None:
        result["adapter"] = {
            "lora": msgspec.to_builtins(bundle.adapter.config),
            "base": bundle.adapter.base,
            "base_digest": bundle.adapter.base_digest,
        }
    return result


def content_digest(bundle: Bundle) -> str:
    """Return the sha256 (64 hex) of :func:`describe`."""
    return canonical.digest(canonical.encode(describe(bundle)))


def save(bundle: Bundle, folder: Path) -> None:
    """Write a bundle to a folder that does not exist yet."""
    folder.mkdir(parents=True)
    arrays.write(folder / _PARAMS, bundle.params)
    if bundle.adapter is not None:
        arrays.write(folder / _ADAPTER, bundle.adapter.params)
    for name, content in bundle.tokenizer.files.items():
        path = folder / _TOKENIZER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / _INFO).write_text(json.dumps(describe(bundle), indent=1, sort_keys=True))
    arrays.seal(folder, {"format": 1})


def load(folder: Path) -> Bundle:
    """Check every file of a folder that :func:`save` wrote, and read it.

    Raises:
        IntegrityError: if a file, the tokenizer or the weights are not what was saved.
    """
    arrays.check(folder)
    info: dict[str, Any] = json.loads((folder / _INFO).read_text())
    tokenizer = _tokenizer(folder, info)
    config = msgspec.convert(info["model"], ModelConfig)
    vocab_size = config.vocab_size or tokenizer.vocab_size
    graph, target = decoder.shape(config, vocab_size)
    params = arrays.read(folder / _PARAMS, target)
    if weights_digest(params) != info["weights_digest"]:
        raise IntegrityError(f"the weights in {folder} do not have the digest in {_INFO}")
    adapter = None
    if (described := info.get("adapter")) is not None:
        lora_config = msgspec.convert(described["lora"], LoraConfig)
        target = lora.shape(config, vocab_size, lora_config)
        adapter_params = arrays.read(folder / _ADAPTER, target)
        base, base_digest = described["base"], described["base_digest"]
        adapter = Adapter(lora_config, adapter_params, base, base_digest)
    limit = info["max_new_tokens"]
    return Bundle(config, graph, jax.device_put(params), tokenizer, limit, adapter)


def _tokenizer(folder: Path, info: dict[str, Any]) -> Tokenizer:
    tokenizer: Tokenizer = ByteTokenizer()
    if info["tokenizer"]["name"] != tokenizer.name:
        from tunix_mlflow.text.hub_tokenizer import HubTokenizer

        tokenizer = HubTokenizer.read(folder / _TOKENIZER, info["model"]["vocab_size"])
    if info["tokenizer"]["digest"] != tokenizer.digest:
        raise IntegrityError(
            f"{folder} was made with tokenizer {info['tokenizer']['name']},"
            f" and this version has another {tokenizer.name}"
        )
    return tokenizer
