"""The tokenizer of a pretrained model: its tokenizer.json, with its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, is_text, prompt_messages
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.files import one_line
from tunix_mlflow.text import answers, chat_template, fidelity, mask
from tunix_mlflow.text.chat_template import (
    ADDED,
    SETTINGS,
    SPECIAL_TOKENS,
    TOKENIZER,
    read_object,
    read_template,
    tools_of,
)
from tunix_mlflow.text.fidelity import Finding
from tunix_mlflow.text.tokenizer import Encoded, Ids, Mask

if TYPE_CHECKING:
    from tokenizers import Encoding

GENERATION = "generation_config.json"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FILES = (TOKENIZER, SETTINGS, *chat_template.FILES, GENERATION, SPECIAL_TOKENS)


class HubTokenizer:
    """The tokenizer of a pretrained model.

    Args:
        files: name -> content; `tokenizer.json` is required.
        where: the model's folder or name, for error messages.
        table_size: tokens that the model knows. A tokenizer may have more (Gemma 3's has one for
            images), and a text that uses one of them is an error. None: all of the tokenizer's.

    Raises:
        ModelError: if a file is missing or damaged, or nothing names an end token.
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
        self.template = read_template(self.files, where)
        self._apply_settings()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.table_size = table_size or self.vocab_size
        self.eos_ids = self._read_eos_ids()
        own, pad_id = self._named_id("eos_token"), self._named_id("pad_token")
        self.own_eos_id = self.eos_ids[0] if own is None else own
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        known = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {i for i, token in known.items() if token.special}
        self._unknown_id = self._read_unknown_id()
        self._dropped: dict[str, bool] = {}  # by character; see _is_dropped
        self._drops = self._is_dropped("\u2d63")  # a letter that few vocabularies have

    @classmethod
    def read(
        cls, folder: Path, table_size: int | None = None, where: str | None = None
    ) -> HubTokenizer:
        """Return the tokenizer of the files in a folder.

        Args:
            folder: with the files.
            table_size: as of the class.
            where: as of the class; None: the folder.

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
        return cls(files, where or str(folder), table_size)

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of the tokenizer's files and of the ids that end a completion."""
        hasher = hashlib.sha256()
        for name in (TOKENIZER, SETTINGS, SPECIAL_TOKENS):
            content = self.files.get(name, b"")
            hasher.update(f"{name}|{len(content)}\n".encode() + content)
        hasher.update(f"eos={self.eos_ids}".encode())
        return hasher.hexdigest()

    def template_digest(self, config: DataConfig) -> str:
        """Return the sha256 (64 hex) of the template and of how reasoning steps enter it."""
        decides = f"steps={config.include_steps}"
        if config.reasoning != "template":
            decides += f"|reasoning={config.reasoning}"
        if config.end != "template":
            decides += f"|end={config.end}"
        text = f"{answers.ANSWER_MARK}|{decides}|{self.template.on(config.today).digest_text()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_example(self, example: Example, config: DataConfig) -> Encoded:
        """Return the ids of a whole example, and which are trained on.

        The text is tokenized as a whole, as transformers does. A token is trained on if one of
        its characters is.

        Raises:
            DatasetError: if the template refuses the messages, or the model lacks a token.
            ModelError: if it is not known what to train on (see mask.py), or the tokenizer does
                not say which characters a token is made of.
        """
        if is_text(example):
            return self._encode_text(example)
        rendered = mask.render(self.template.on(config.today), example, self._ends(), config)
        encoding, listed = self._encode(rendered.text)
        ids = np.array(listed, np.int32)
        trained, findings = np.zeros(len(ids), np.bool_), fidelity.missing(rendered)
        inserted: list[int] = []  # before which tokens an end is added
        for turn in rendered.turns:
            ended = False
            for number, (start, stop) in enumerate(turn.spans):
                first, last = self._tokens(encoding, rendered.text, start, stop)
                if first == last and number:
                    continue  # a generation that is empty here ends nothing
                if rendered.marked:  # as transformers: of several for one character the first
                    final = encoding.char_to_token(stop - 1) if stop else None
                    last = last if final is None else min(last, final + 1)
                end = self._end(encoding, ids, first, last, rendered.text, stop)
                ended = end is not None
                if end is not None and not rendered.marked:  # a line break behind is not its own
                    last = end + 1
                trained[first:last] = True
            if not ended and config.end == "append" and turn.spans:
                inserted.append(last)
            elif not ended:
                findings.append(Finding(fidelity.END, turn.message + 1, True, ""))
        findings += self._unknown(encoding, listed, rendered.text, trained)
        prompt = self._prompt_text(example, config)
        if not self._begins(rendered.text, prompt, encoding, listed):
            findings.append(Finding(fidelity.PROMPT, 0, False, prompt[-40:]))
        if inserted:
            ids = np.insert(ids, inserted, self.own_eos_id).astype(np.int32)
            trained = np.insert(trained, inserted, True)
        return Encoded(ids, trained, tuple(findings))

    def encode_prompt(self, example: Example, config: DataConfig) -> Ids:
        """Return the ids of everything before the completion, rendered as an example would be.

        Raises:
            DatasetError: if the template refuses the messages, or the model lacks a token.
        """
        if is_text(example):
            begun = example.messages[-1].text if example.answer is not None else ""
            bos = self._named_id("bos_token")
            before = [] if bos is None else [bos]
            return np.array([*before, *self._encode(begun)[1]], np.int32)
        text = self._prompt_text(example, config)
        encoding, listed = self._encode(text)
        ids, inserted = np.array(listed, np.int32), []
        if config.end == "append" and config.turns == "all":
            # Earlier turns have the ends that training gave them.
            earlier = Example(messages=prompt_messages(example), tools=example.tools)
            template = self.template.on(config.today)
            rendered = mask.render(template, earlier, self._ends(), config)
            for turn in rendered.turns:
                for start, stop in turn.spans[-1:]:
                    if text.startswith(rendered.text[:stop]):
                        first, last = self._tokens(encoding, text, start, stop)
                        if self._end(encoding, ids, first, last, text, stop) is None:
                            inserted.append(last)
        return np.insert(ids, inserted, self.own_eos_id).astype(np.int32)

    def _encode_text(self, example: Example) -> Encoded:
        """Encode a text without turns, between the tokens that begin and end one."""
        encoding, listed = self._encode(example.messages[-1].text)
        bos, eos = (self._named_id(name) for name in ("bos_token", "eos_token"))
        before, after = ([] if token is None else [token] for token in (bos, eos))
        ids = np.array([*before, *listed, *after], np.int32)
        trained = np.ones(len(ids), np.bool_)
        trained[: len(before)] = False
        own = trained[len(before) : len(before) + len(listed)]
        findings = self._unknown(encoding, listed, example.messages[-1].text, own)
        return Encoded(ids, trained, tuple(findings))

    def _ends(self) -> list[str]:
        return [str(self._tokenizer.id_to_token(i)) for i in self.eos_ids]

    def _end(
        self, encoding: Encoding, ids: Ids, first: int, last: int, text: str, stop: int
    ) -> int | None:
        """Return the place of the token that ends a turn: nothing but white space follows it."""
        own = np.flatnonzero(np.isin(ids[first:last], self.eos_ids))
        if not len(own):
            return None
        place = first + int(own[-1])
        return None if _text_after(encoding, place, text, stop) else place

    def _prompt_text(self, example: Example, config: DataConfig) -> str:
        template = self.template.on(config.today)
        messages = mask.rendered_messages(template, prompt_messages(example), config)
        return template.render(messages, tools_of(example), add_generation_prompt=True)

    def _begins(self, text: str, prompt: str, encoding: Encoding, ids: list[int]) -> bool:
        """Return whether the ids of a prompt are the first of a text's.

        What stands before a special token does not depend on what follows it, so only the rest is
        tokenized again.
        """
        if not text.startswith(prompt):
            return False
        count = self._tokens(encoding, text, 0, len(prompt))[1]
        first = next((n for n in range(count - 1, 0, -1) if ids[n] in self._special_ids), 0)
        start = _first_character(encoding, first) if first else 0
        tail = self._tokenizer.encode(prompt[start:], add_special_tokens=False).ids
        return bool(ids[first:count] == tail)

    def _tokens(self, encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int]:
        """Return the first of the tokens that have a character of a range, and the one after; the
        same place twice if there are none.

        Raises:
            ModelError: if the tokenizer does not say which characters its tokens have.
        """
        inside = (encoding.char_to_token(place) for place in range(start, stop))
        first = next((token for token in inside if token is not None), None)
        if first is None:
            if text[start:stop].strip():
                raise ModelError(
                    f"{self.where}: {TOKENIZER} does not say which characters its tokens are made"
                    " of, so it is not known which of them to train on"
                )
            return self._next(encoding, text, stop), self._next(encoding, text, stop)
        after = self._next(encoding, text, stop)
        straddles = after < len(encoding) and _first_character(encoding, after) < stop
        return first, after + straddles

    def _next(self, encoding: Encoding, text: str, place: int) -> int:
        """Return the first token that has a character from a place on; behind all: their number."""
        behind = (encoding.char_to_token(place) for place in range(place, len(text)))
        return next((token for token in behind if token is not None), len(encoding))

    def _unknown(
        self, encoding: Encoding, ids: list[int], text: str, trained: Mask
    ) -> list[Finding]:
        """Return the first text that became the token for unknown ones: of what is trained on, and
        of the rest."""
        found: dict[bool, str] = {}
        if self._unknown_id is not None and self._unknown_id in ids:
            spelled = self._tokenizer.id_to_token(self._unknown_id)
            for place, (token, (start, stop)) in enumerate(zip(ids, encoding.offsets, strict=True)):
                if token == self._unknown_id and text[start:stop] != spelled:
                    found.setdefault(bool(trained[place]), text[start:stop])
        return [Finding(fidelity.UNKNOWN, 0, is_trained, t) for is_trained, t in found.items()]

    def decode(self, ids: Sequence[int] | Ids, *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        text: str = self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def read_answer(self, ids: Sequence[int] | Ids, *, marked: bool) -> str | None:
        """Return the answer in a completion, see :func:`answers.read_answer`."""
        return answers.read_answer(self.decode(ids), marked=marked)

    def _encode(self, text: str) -> tuple[Encoding, list[int]]:
        """Tokenize a text. Special tokens in it, which the template wrote, become their ids; none
        is added.

        Raises:
            DatasetError: if the model lacks a token, or the tokenizer would drop a character: then
                it does not say either which characters its tokens are made of.
        """
        if self._drops and (lost := next((c for c in text if self._is_dropped(c)), None)):
            raise DatasetError(
                f"{self.where}: {TOKENIZER} has no token for {lost!r} (U+{ord(lost):04X}), and none"
                " for unknown text, so the character would be lost"
            )
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids  # a new list each time it is asked for
        if ids and max(ids) >= self.table_size:
            token = self._tokenizer.id_to_token(max(ids))
            raise DatasetError(f"{self.where}: the model does not know the token {token!r}")
        return encoding, ids

    def _is_dropped(self, character: str) -> bool:
        """Return whether a character gets no token at all: three of them have as many as one.

        One that the normalizer removes is not meant: offsets know of it.
        """
        if character not in self._dropped:
            normalizer = self._tokenizer.normalizer
            kept = character if normalizer is None else normalizer.normalize_str(character)
            one, three = (
                self._tokenizer.encode(character * count, add_special_tokens=False).ids
                for count in (1, 3)
            )
            unknown = self._unknown_id is not None and self._unknown_id in one
            self._dropped[character] = one == three and not unknown and bool(kept.strip())
        return self._dropped[character]

    def _apply_settings(self) -> None:
        """Add the tokens that the settings have beside tokenizer.json, as transformers does.

        Raises:
            ModelError: if a token gets another id than the settings say, or special tokens in a
                text would be split.
        """
        from tokenizers import AddedToken

        settings = read_object(self.files, SETTINGS, self.where)
        if settings.get("split_special_tokens"):
            raise ModelError(f"{self.where}: split_special_tokens in {SETTINGS} is not supported")
        listed = settings.get(ADDED) or {}
        try:
            tokens = {int(i): AddedToken(**t) for i, t in listed.items() if isinstance(t, dict)}
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.where}: {ADDED} in {SETTINGS} is damaged: {error}") from error
        for number, token in sorted(tokens.items()):
            if token != self._tokenizer.get_added_tokens_decoder().get(number):
                self._tokenizer.add_tokens([token])
            if self._token_id(token.content) != number:
                raise ModelError(
                    f"{self.where}: {SETTINGS} gives the token {token.content!r} the id {number},"
                    f" and {TOKENIZER} has another"
                )
        named = self.template.special_tokens
        order = [*(f"{name}_token" for name in _NAMED), *named]  # as transformers adds them
        listed_too = settings.get("extra_special_tokens", settings.get("additional_special_tokens"))
        extra = [
            item.get("content") if isinstance(item, dict) else item
            for item in (listed_too if isinstance(listed_too, list) else ())
        ]
        for content in dict.fromkeys([*(named.get(name) for name in order), *extra]):
            if isinstance(content, str) and self._token_id(content) is None:
                self._tokenizer.add_tokens([AddedToken(content, special=True)])

    def _read_eos_ids(self) -> tuple[int, ...]:
        """Return the ids of generation_config.json, the tokenizer and the template."""
        value = read_object(self.files, GENERATION, self.where).get("eos_token_id")
        listed = value if isinstance(value, list) else [value] if value is not None else []
        if not all(isinstance(i, int) for i in listed):
            raise ModelError(f"{self.where}: eos_token_id of {GENERATION} is {value!r}")
        own = self._named_id("eos_token")
        eos_ids = sorted({i for i in [*listed, own, self._template_eos_id()] if i is not None})
        eos_ids = [i for i in eos_ids if i < self.table_size]
        if not eos_ids:
            raise ModelError(
                f"{self.where}: neither {SETTINGS} nor {GENERATION} names an end-of-sequence token"
            )
        return tuple(eos_ids)

    def _read_unknown_id(self) -> int | None:
        """Return the id that stands for unknown text, if the tokenizer has one."""
        model = self._tokenizer.model
        if type(model).__name__ == "Unigram":  # the library shows its number in the file alone
            number = json.loads(self._tokenizer.to_str())["model"].get("unk_id")
            return None if number is None else int(number)
        return self._token_id(getattr(model, "unk_token", None))

    def _template_eos_id(self) -> int | None:
        """Return the special token with which the template ends a turn of the assistant.

        The tokenizer of a base model names another one, and generation would never stop.
        """
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@y@"}]
        try:
            tail = self.template.render(messages).rpartition("@y@")[2]
        except (DatasetError, ModelError):
            return None
        known = self._tokenizer.get_added_tokens_decoder()
        for token in self._tokenizer.encode(tail, add_special_tokens=False).ids:
            if token in known and known[token].special:
                return int(token)
            if self.decode([token]).strip():
                return None
        return None

    def _named_id(self, name: str) -> int | None:
        """Return the id of `bos_token` and the like; None: there is none that the model knows."""
        token = self._token_id(self.template.special_tokens.get(name))
        return token if token is not None and token < self.table_size else None

    def _token_id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def _first_character(encoding: Encoding, token: int) -> int:
    place = encoding.token_to_chars(token)
    return 0 if place is None else int(place[0])


def _text_after(encoding: Encoding, token: int, text: str, stop: int) -> str:
    """Return what follows a token in a text up to a place, without white space around it."""
    characters = encoding.token_to_chars(token)
    return "" if characters is None else text[characters[1] : stop].strip()
