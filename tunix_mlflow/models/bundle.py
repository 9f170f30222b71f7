"""A model with its tokenizer and limits, as a folder of Orbax arrays and JSON: never code.

bundle.json      model configuration, tokenizer, template, rendering, limits, digests
params/          Orbax
tokenizer/       of a pretrained model: tokenizer.json, template and settings
adapter/         Orbax, if the model was trained with LoRA; `params` has it merged already
manifest.json    size and sha256 of every file, written last
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec

from tunix_mlflow.config.schema import (
    RENDERING,
    DataConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
)
from tunix_mlflow.data import canonical
from tunix_mlflow.data import messages as rows
from tunix_mlflow.data.examples import TEXT, Example, Message, to_answer
from tunix_mlflow.errors import DatasetError, IntegrityError, ModelError
from tunix_mlflow.models import arrays, decoder, generation, lora
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.runtime import memory
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.text.tokenizer import Ids, Tokenizer

_INFO = "bundle.json"
_PARAMS = "params"
_ADAPTER = "adapter"
_TOKENIZER = "tokenizer"


# The positions of the model limit a request.
_NO_LIMITS = LimitsConfig(
    prompt_characters=sys.maxsize, answer_characters=sys.maxsize, step_characters=sys.maxsize
)


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
    data: DataConfig = DataConfig()  # of its training: RENDERING of it is kept
    forms: tuple[str, ...] = ()  # what the examples of its training end with; see form_of

    def complete(
        self, examples: Sequence[Example], max_new_tokens: int | None = None
    ) -> list[Completion]:
        """Complete the prompts of `examples` greedily, each as if it were alone.

        A prompt that cannot be completed has an error in place of a text.

        Args:
            examples: whose prompts are completed.
            max_new_tokens: limit of a completion; None: that of the bundle.
        """
        results: list[Completion | None] = [None] * len(examples)
        pending: list[_Prompt] = []
        for index, example in enumerate(examples):
            try:
                pending.append(self._prompt(index, example, max_new_tokens))
            except (DatasetError, ModelError) as error:
                results[index] = Completion(error=str(error))
        for part in self._parts(pending, results):
            generated = generation.generate(
                self.graph,
                self.params,
                [prompt.ids for prompt in part],
                limits=[prompt.limit for prompt in part],
                eos_ids=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.pad_id,
            )
            for prompt, (ids, cut_off) in zip(part, generated, strict=True):
                text = self.tokenizer.decode(ids)
                # What was cut off may not have come to its answer.
                marked = "answer" in self.forms
                answer = None if cut_off else self.tokenizer.read_answer(ids, marked=marked)
                results[prompt.row] = Completion(text, answer, "length" if cut_off else "stop")
        return [result for result in results if result is not None]

    def _prompt(self, index: int, example: Example, max_new_tokens: int | None) -> _Prompt:
        """Return the ids of a prompt, and how many tokens its completion may have.

        Raises:
            DatasetError: if the template refuses it, or it leaves no position.
            ModelError: if there is no template.
        """
        if self.forms == ("text",) and example.tools is None and len(example.messages) == 1:
            example = to_answer((Message(role=TEXT, content=example.messages[0].content),))
        ids = self.tokenizer.encode_prompt(example, self.data)
        limit = max_new_tokens or self.max_new_tokens
        if self.config.max_positions is not None:
            limit = min(limit, self.config.max_positions - len(ids))
            if limit < 1:
                raise DatasetError(
                    f"the prompt has {len(ids)} tokens, and the model has"
                    f" {self.config.max_positions} positions"
                )
        return _Prompt(index, ids, limit)

    def _parts(
        self, pending: list[_Prompt], results: list[Completion | None]
    ) -> Iterator[list[_Prompt]]:
        """Yield prompts that fit into memory together; one that does not alone gets an error."""
        leaf = jax.tree.leaves(self.params)[0]
        allowed = _free_bytes(next(iter(leaf.devices())))
        part: list[_Prompt] = []
        for prompt in pending:
            needed = self._cache_bytes([prompt], leaf.dtype.itemsize)
            if needed > allowed:
                results[prompt.row] = Completion(
                    error=f"a prompt of {len(prompt.ids)} tokens and {prompt.limit} new ones need"
                    f" {needed / 1e9:.2f} GB, and {allowed / 1e9:.2f} GB are free; lower"
                    " max_new_tokens"
                )
                continue
            together = self._cache_bytes([*part, prompt], leaf.dtype.itemsize)
            if part and together > allowed // 2:
                yield part
                part = []
            part.append(prompt)
        if part:
            yield part

    def _cache_bytes(self, prompts: list[_Prompt], itemsize: int) -> int:
        longest = max(len(prompt.ids) for prompt in prompts)
        limit = max(prompt.limit for prompt in prompts)
        rows = generation.padded_rows(len(prompts))
        return rows * generation.cache_bytes(self.config, longest, limit, itemsize)


class Completion(NamedTuple):
    """What a model answers to a prompt."""

    text: str | None = None
    answer: str | None = None  # None: the text has none, or was cut off
    finish_reason: str | None = None  # stop, or length: its limit cut it off
    error: str | None = None  # why there is none of these


class _Prompt(NamedTuple):
    row: int
    ids: Ids
    limit: int


def _free_bytes(device: jax.Device) -> int:
    """Return how much memory a device has left."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return memory.available().bytes


def prompt(text: str) -> Example:
    """Return a prompt as an example without a known answer; a model of texts continues it."""
    return to_answer((Message(role="user", content=text),))


def conversation(messages: object, tools: object = None, system: object = None) -> Example:
    """Return messages, as training takes them, as an example without a known answer.

    Args:
        messages: each with role and content, or with other keys that a row may have.
        tools: definitions of tools, or their JSON text.
        system: a text that comes before them.

    Raises:
        DatasetError: if they are none, or the last is the assistant's.
    """
    try:
        turns = rows.turns(messages, "$.messages", _NO_LIMITS)
        defined = rows.tools({"tools": tools})
        if system is not None:
            content = rows.checked(system, "$.system", _NO_LIMITS, "prompt_characters")
            turns = (Message(role="system", content=content), *turns)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    if turns[-1].is_assistant:
        raise DatasetError("the last message must be one to answer - at `$.messages`")
    return to_answer(turns, defined)


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
            "template_digest": tokenizer.template_digest(bundle.data),
        },
        "rendering": _rendering(bundle.data),
        "forms": list(bundle.forms),
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


def _rendering(data: DataConfig) -> dict[str, Any]:
    """Return the keys that decide how prompts are rendered, and are not the default."""
    own, default = msgspec.to_builtins(data), msgspec.to_builtins(DataConfig())
    return {key: own[key] for key in RENDERING if own[key] != default[key]}


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
    limit, data = info["max_new_tokens"], msgspec.convert(info["rendering"], DataConfig)
    forms = tuple(info["forms"])
    return Bundle(config, graph, jax.device_put(params), tokenizer, limit, adapter, data, forms)


def _tokenizer(folder: Path, info: dict[str, Any]) -> Tokenizer:
    tokenizer: Tokenizer = ByteTokenizer()
    if info["tokenizer"]["name"] != tokenizer.name:
        from tunix_mlflow.text.hub_tokenizer import HubTokenizer

        tokenizer = HubTokenizer.read(
            folder / _TOKENIZER, info["model"]["vocab_size"], where="the model"
        )
    if info["tokenizer"]["digest"] != tokenizer.digest:
        raise IntegrityError(
            f"{folder} was made with tokenizer {info['tokenizer']['name']},"
            f" and this version has another {tokenizer.name}"
        )
    return tokenizer
