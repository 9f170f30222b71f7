"""The tokenizer of a pretrained model: its tokenizer.json, with its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tunix_mlflow.data.examples import Example, prompt_messages
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.files import one_line
from tunix_mlflow.text import answers, mask
from tunix_mlflow.text.chat_template import (
    SETTINGS,
    SPECIAL_TOKENS,
    TEMPLATE,
    read_object,
    read_template,
    template_message,
)
from tunix_mlflow.text.tokenizer import Ids, Mask

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
FILES = (TOKENIZER, SETTINGS, TEMPLATE, GENERATION, SPECIAL_TOKENS)


class HubTokenizer:
    """The tokenizer of a pretrained model.

    Args:
        files: name -> content; `tokenizer.json` is required.
        where: the model's folder or name, for error messages.
        table_size: tokens that the model knows. A tokenizer may have more (Gemma 3's has one for
            images), and a text that uses one of them is an error. None: all of the tokenizer's.

    Raises:
        ModelError: if a file is missing or damaged, or there is no chat template.
    """

    name = "tokenizer.json"

    def __init__(
        self, files: Mapping[str, bytes], where: str, table_size: int | None = None
    ) -> None:
        from tokenizers import Tokenizer

        self.files, self.where = {n: files[n] for n in sorted(files) if n in FILES}, where
        if TOKENIZER not in files:
            raise ModelError(f"{where} has no {TOKENIZER}")
        try:
            self._tokenizer = Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{where}: {TOKENIZER} is damaged: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.table_size = table_size or self.vocab_size
        self.template = read_template(self.files, where)
        self.eos_ids = self._read_eos_ids()
        pad_id = self._token_id(self.template.special_tokens.get("pad_token"))
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id

    @classmethod
    def read(cls, folder: Path, table_size: int | None = None) -> HubTokenizer:
        """Return the tokenizer of the files in a folder.

        Raises:
            ModelError: as the class, or if the folder cannot be read.
        """
        try:
            files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
            if GENERATION not in files and (folder / "config.json").is_file():
                eos = json.loads((folder / "config.json").read_bytes()).get("eos_token_id")
                files[GENERATION] = json.dumps({"eos_token_id": eos}).encode()
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder} cannot be read: {one_line(error)}") from error
        return cls(files, str(folder), table_size)

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of the tokenizer's files and of the ids that end a completion."""
        hasher = hashlib.sha256()
        for name in (TOKENIZER, SETTINGS, SPECIAL_TOKENS):
            content = self.files.get(name, b"")
            hasher.update(f"{name}|{len(content)}\n".encode() + content)
        hasher.update(f"eos={self.eos_ids}".encode())
        return hasher.hexdigest()

    def template_digest(self, include_steps: bool) -> str:
        """Return the sha256 (64 hex) of the template and of how reasoning steps enter it."""
        text = f"{answers.ANSWER_MARK}|steps={include_steps}|{self.template.source}"
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_example(self, example: Example, *, include_steps: bool) -> tuple[Ids, Mask]:
        """Return the ids [n] of a whole example and the mask [n] of those that are trained on.

        Raises:
            DatasetError: if the template refuses the messages, or the model lacks a token.
            ModelError: if it is not known what to train on (see mask.py), or decoding does not
                give the text back.
        """
        ids: list[int] = []
        trained: list[bool] = []
        eos_tokens = [str(self._tokenizer.id_to_token(i)) for i in self.eos_ids]
        for span in mask.template_spans(
            self.template, example, eos_tokens, include_steps=include_steps
        ):
            part = self._encode(span.text)
            count = mask.trained_length(part, self.eos_ids) if span.trained else 0
            ids += part
            trained += [True] * count + [False] * (len(part) - count)
        return np.array(ids, np.int32), np.array(trained, np.bool_)

    def encode_prompt(self, example: Example) -> Ids:
        """Return the ids of everything before the completion.

        Raises:
            DatasetError: if the template refuses the messages, or the model lacks a token.
        """
        messages = [template_message(m, True) for m in prompt_messages(example)]
        text = self.template.render(messages, add_generation_prompt=True)
        return np.array(self._encode(text), np.int32)

    def decode(self, ids: Sequence[int] | Ids, *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        text: str = self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def read_answer(self, ids: Sequence[int] | Ids) -> str | None:
        """Return the answer in a completion, see :func:`answers.read_answer`."""
        return answers.read_answer(self.decode(ids))

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text, after checking that decoding gives the text back.

        Special tokens in the text, which the template wrote, become their ids; none is added.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.table_size:
            token = self._tokenizer.id_to_token(max(ids))
            raise DatasetError(f"{self.where}: the model does not know the token {token!r}")
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False)
        if decoded != text:
            normalizer = self._tokenizer.normalizer
            if normalizer is None or decoded != normalizer.normalize_str(text):
                raise ModelError(
                    f"{self.where}: {TOKENIZER} decodes {text[:60]!r} as {decoded[:60]!r}"
                )
        return ids

    def _read_eos_ids(self) -> tuple[int, ...]:
        """Return the ids of generation_config.json, the tokenizer and the template."""
        value = read_object(self.files, GENERATION, self.where).get("eos_token_id")
        listed = value if isinstance(value, list) else [value] if value is not None else []
        if not all(isinstance(i, int) for i in listed):
            raise ModelError(f"{self.where}: eos_token_id of {GENERATION} is {value!r}")
        own = self._token_id(self.template.special_tokens.get("eos_token"))
        eos_ids = sorted({i for i in [*listed, own, self._template_eos_id()] if i is not None})
        if not eos_ids:
            raise ModelError(
                f"{self.where}: neither {SETTINGS} nor {GENERATION} names an end-of-sequence token"
            )
        return tuple(eos_ids)

    def _template_eos_id(self) -> int | None:
        """Return the special token with which the template ends a turn of the assistant.

        The tokenizer of a base model names another one, and generation would never stop.
        """
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@y@"}]
        try:
            tail = self.template.render(messages).rpartition("@y@")[2]
        except DatasetError:
            return None
        ids = self._tokenizer.encode(tail, add_special_tokens=False).ids
        known = self._tokenizer.get_added_tokens_decoder()
        return int(ids[0]) if ids and ids[0] in known and known[ids[0]].special else None

    def _token_id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)
