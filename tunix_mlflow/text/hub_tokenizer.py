"""The tokenizer of a pretrained model: tokenizer.json, and its chat template in a sandbox.

What is trained on follows from the template: where it marks what the assistant generates, that;
elsewhere the text that a turn of the assistant adds to everything before it. The text is cut at
these places before it is tokenized, as it is when a model answers, so no token crosses one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunix_mlflow.data.examples import Example, Message
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.tokenizer import Ids, Mask

if TYPE_CHECKING:
    import jinja2

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
FILES = (TOKENIZER, SETTINGS, TEMPLATE, GENERATION, "special_tokens_map.json")
ANSWER_MARK = "####"
"""Stands before the answer of an example with reasoning steps, as in GSM8K (Cobbe et al. 2021)."""
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private characters around what a template marks


class _Piece(NamedTuple):
    text: str
    trained: bool


class HubTokenizer:
    """See the module.

    Args:
        files: by name, of which `tokenizer.json` is needed.
        where: what errors call their place.
        table: tokens that the model knows; a tokenizer may have more (Gemma 3's has one for
            images), which no text may use. None: all.

    Raises:
        ModelError: if a file is missing, damaged, or there is no chat template.
    """

    name = "tokenizer.json"

    def __init__(self, files: Mapping[str, bytes], where: str, table: int | None = None) -> None:
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
        settings = self._object(SETTINGS)
        self._special = _special(settings, self._object("special_tokens_map.json"))
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.table = table or self.vocab_size
        self.template = _template(files, settings, where)
        self.eos_ids = self._ends()
        self.pad_id = self._id(self._special.get("pad_token"), self.eos_ids[0])

    @classmethod
    def read(cls, folder: Path, table: int | None = None) -> HubTokenizer:
        """Of the files in a folder."""
        try:
            found = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
            if GENERATION not in found and (folder / "config.json").is_file():
                ends = json.loads((folder / "config.json").read_bytes()).get("eos_token_id")
                found[GENERATION] = json.dumps({"eos_token_id": ends}).encode()
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error
        return cls(found, str(folder), table)

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of the tokenizer's files and of what ends a completion."""
        hasher = hashlib.sha256()
        for name in (TOKENIZER, SETTINGS, "special_tokens_map.json"):
            content = self.files.get(name, b"")
            hasher.update(f"{name}|{len(content)}\n".encode() + content)
        hasher.update(f"eos={self.eos_ids}".encode())
        return hasher.hexdigest()

    def template_digest(self, include_steps: bool) -> str:
        """sha256 (64 hex) of the template and of how reasoning steps are put into it."""
        said = f"{ANSWER_MARK}|steps={include_steps}|{self.template}"
        return hashlib.sha256(said.encode()).hexdigest()

    def example(self, example: Example, *, include_steps: bool) -> tuple[Ids, Mask]:
        """Ids [n] of a whole example and, for each, whether it is trained on.

        Raises:
            DatasetError: if the template refuses the messages, or the model lacks a token.
            ModelError: if the template does not tell what is trained on, or the tokenizer does
                not give the text back.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for piece in self._pieces(example, include_steps):
            made = self._encode(piece.text)
            keep = len(made)
            if piece.trained:  # a line's end after the end of a turn is not the model's to say
                ends = [place for place, token in enumerate(made) if token in self.eos_ids]
                keep = ends[-1] + 1 if ends else keep
            ids += made
            trained += [piece.trained] * keep + [False] * (len(made) - keep)
        return np.array(ids, np.int32), np.array(trained, np.bool_)

    def prompt(self, example: Example) -> Ids:
        """Ids of everything before the completion.

        Raises:
            DatasetError: if the template refuses the messages.
        """
        messages = example.messages if example.answer is not None else example.messages[:-1]
        text = self._render([_message(m, True) for m in messages], add_generation_prompt=True)
        return np.array(self._encode(text), np.int32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text, without special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def spell(self, ids: Sequence[int] | Ids) -> str:
        """Text, with special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def answer(self, ids: Sequence[int] | Ids) -> str | None:
        """What follows the last mark of an answer; where there is none, all that was said.

        What was thought before it is left out. None where nothing was said.
        """
        said = self.decode(ids).rpartition("</think>")[2]
        return said.rpartition(ANSWER_MARK)[2].strip() or None

    def _pieces(self, example: Example, include_steps: bool) -> list[_Piece]:
        """The text of an example, cut where what is trained on begins and ends."""
        said = [_message(m, include_steps) for m in example.messages]
        trained = [m.role == "assistant" and m.trained is not False for m in example.messages]
        if example.answer is not None:
            said.append({"role": "assistant", "content": _completion(example, include_steps)})
            trained.append(True)
        if self._marks:
            return self._marked(said, trained)
        whole = self._render(said)
        pieces: list[_Piece] = []
        done = 0
        for number, wanted in enumerate(trained):
            if not wanted:
                continue
            start = self._begin(said, number, whole)
            stop = len(whole) if number == len(said) - 1 else self._end(said, number, start, whole)
            pieces += [_Piece(whole[done:start], False), _Piece(whole[start:stop], True)]
            done = stop
        return [*pieces, _Piece(whole[done:], False)]

    def _begin(self, said: list[dict[str, Any]], number: int, whole: str) -> int:
        """Where a turn begins in the whole text: after what a model is given to answer."""
        before = self._render(said[:number], add_generation_prompt=True)
        if not whole.startswith(before):
            raise self._unclear(number)
        return len(before)

    def _end(self, said: list[dict[str, Any]], number: int, start: int, whole: str) -> int:
        """Where a turn ends in the whole text, which may leave out thoughts of earlier turns."""
        after = self._render(said[: number + 1])
        if whole.startswith(after):
            return len(after)
        content = str(said[number]["content"]).strip()
        at = whole.find(content, start)
        ends = [str(self._tokenizer.id_to_token(i)) for i in self.eos_ids]
        stops = [whole.find(end, at + len(content)) + len(end) for end in ends]
        stops = [stop for stop, end in zip(stops, ends, strict=True) if stop >= len(end)]
        if at < 0 or not stops:
            raise self._unclear(number)
        return min(stops)

    def _unclear(self, number: int) -> ModelError:
        return ModelError(
            f"{self.where}: the chat template writes message {number + 1} otherwise once more"
            " messages follow, so it does not tell what is trained on: mark it in the template"
            " with {% generation %} and {% endgeneration %}, or train on last turns alone"
        )

    def _marked(self, said: list[dict[str, Any]], trained: list[bool]) -> list[_Piece]:
        """Pieces by the template's own marks; one for each turn of the assistant."""
        if any(_OPEN in str(m) or _CLOSE in str(m) for m in said):
            raise DatasetError("a message has the private characters U+E0F0 or U+E0F1")
        parts = self._render(said, keep=True).split(_OPEN)
        turns = [trained[n] for n, message in enumerate(said) if message["role"] == "assistant"]
        if len(parts) - 1 != len(turns):
            raise ModelError(
                f"{self.where}: the chat template marks {len(parts) - 1} generations in a"
                f" conversation with {len(turns)} turns of the assistant"
            )
        pieces = [_Piece(parts[0], False)]
        for part, wanted in zip(parts[1:], turns, strict=True):
            inside, _, outside = part.partition(_CLOSE)
            pieces += [_Piece(inside, wanted), _Piece(outside, False)]
        return pieces

    def _encode(self, text: str) -> list[int]:
        """Ids of a piece, which must give the text back.

        Special tokens of the template are found in the text, and none is added to it.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.table:
            token = self._tokenizer.id_to_token(max(ids))
            raise DatasetError(f"{self.where}: the model does not know the token {token!r}")
        back = self._tokenizer.decode(ids, skip_special_tokens=False)
        if back != text:
            normalizer = self._tokenizer.normalizer
            if normalizer is None or back != normalizer.normalize_str(text):
                raise ModelError(
                    f"{self.where}: {TOKENIZER} gives {back[:60]!r} back for {text[:60]!r}"
                )
        return ids

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.template)
        except jinja2.TemplateError as error:
            raise ModelError(f"{self.where}: the chat template is damaged: {error}") from error

    @cached_property
    def _marks(self) -> bool:
        """Whether the template says what the assistant generates."""
        from jinja2 import nodes

        said = _environment().parse(self.template).find_all(nodes.TemplateData)
        return any(_OPEN in piece.data for piece in said)

    def _render(
        self,
        said: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        keep: bool = False,
    ) -> str:
        import jinja2

        try:
            text = self._compiled.render(
                messages=said,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError, AttributeError),
            *(ArithmeticError, LookupError, RuntimeError),
        ) as error:
            reason = " ".join(str(error).split())
            raise DatasetError(f"{self.where}: the chat template refuses: {reason}") from error
        return text if keep else text.replace(_OPEN, "").replace(_CLOSE, "")

    def _object(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise ModelError(f"{self.where}: {name} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ModelError(f"{self.where}: {name} holds no object")
        return found

    def _ends(self) -> tuple[int, ...]:
        given = self._object(GENERATION).get("eos_token_id")
        listed = given if isinstance(given, list) else [given] if given is not None else []
        own = self._id(self._special.get("eos_token"), None)
        if not all(isinstance(i, int) for i in listed):
            raise ModelError(f"{self.where}: eos_token_id of {GENERATION} is {given!r}")
        ends = sorted({i for i in [*listed, own, self._closing()] if i is not None})
        if not ends:
            raise ModelError(f"{self.where}: neither {SETTINGS} nor {GENERATION} says what ends")
        return tuple(ends)

    def _closing(self) -> int | None:
        """The special token that the template ends a turn of the assistant with, if it has one.

        Base models name another one as their end, and would never stop.
        """
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@y@"}]
        try:
            tail = self._render(said).rpartition("@y@")[2]
        except DatasetError:
            return None
        ids = self._tokenizer.encode(tail, add_special_tokens=False).ids
        known = self._tokenizer.get_added_tokens_decoder()
        return int(ids[0]) if ids and ids[0] in known and known[ids[0]].special else None

    def _id(self, token: str | None, default: Any) -> Any:
        found = None if token is None else self._tokenizer.token_to_id(token)
        return default if found is None else found


def _completion(example: Example, include_steps: bool) -> str:
    if not include_steps or not example.steps:
        return example.answer or ""
    steps = "\n".join(step.content for step in example.steps)
    return f"{steps}\n{ANSWER_MARK} {example.answer}"


def _message(message: Message, include_steps: bool) -> dict[str, Any]:
    """A message as templates know it."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        said["name"] = message.name
    if message.reasoning is not None and include_steps:
        said["reasoning_content"] = message.reasoning
    if message.tool_calls is not None:
        said["tool_calls"] = json.loads(message.tool_calls)
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    return said


def _special(*places: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, as templates know them."""
    found: dict[str, str] = {}
    for place in reversed(places):
        for key, value in place.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _template(files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> str:
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{where}: {TEMPLATE} is not UTF-8") from error
    given = settings.get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        given = named.get("default")
    if not isinstance(given, str):
        raise ModelError(f"{where} has no chat template: put {TEMPLATE} beside {TOKENIZER}")
    return given


def _environment() -> jinja2.Environment:
    """What a template may do: nothing but write text."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what the assistant generates."""

        tags = {"generation"}  # noqa: RUF012  jinja2 reads it of the class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE)]
            return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    # No strftime_now: what is trained on would depend on the day.
    return made
