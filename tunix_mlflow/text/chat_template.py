"""The chat template of a pretrained model: Jinja in a sandbox that can only write text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunix_mlflow.data.examples import Message
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.files import one_line

if TYPE_CHECKING:
    import jinja2

SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private characters around what a template marks


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special_tokens: `bos_token` and the like, by the names that templates use.
        where: the model's folder or name, for error messages.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        self.source, self.special_tokens, self.where = source, special_tokens, where

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the text of messages, which are as :func:`template_message` makes them.

        Raises:
            DatasetError: if the template refuses the messages.
            ModelError: if the template is damaged.
        """
        text = self._render(messages, add_generation_prompt)
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def render_generations(
        self, messages: list[dict[str, Any]]
    ) -> tuple[str, list[tuple[str, str]]]:
        """Return the text before the first generation, then (generation, text after it) pairs.

        Raises:
            DatasetError: if the template refuses the messages.
            ModelError: if the template is damaged.
        """
        if any(_OPEN in str(m) or _CLOSE in str(m) for m in messages):
            raise DatasetError("a message has the private characters U+E0F0 or U+E0F1")
        before, *parts = self._render(messages, False).split(_OPEN)
        cut = [part.partition(_CLOSE) for part in parts]
        return before, [(generated, after) for generated, _, after in cut]

    @cached_property
    def marks_generations(self) -> bool:
        """Whether the template marks what the assistant generates."""
        from jinja2 import nodes

        texts = _environment().parse(self.source).find_all(nodes.TemplateData)
        return any(_OPEN in text.data for text in texts)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{self.where}: the chat template is damaged: {error}") from error

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError, AttributeError),
            *(ArithmeticError, LookupError, RuntimeError),
        ) as error:
            reason = one_line(error)
            raise DatasetError(f"{self.where}: the chat template refuses: {reason}") from error


def template_message(message: Message, include_steps: bool) -> dict[str, Any]:
    """Return a message with the keys that templates know."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        result["name"] = message.name
    if message.reasoning is not None and include_steps:
        result["reasoning_content"] = message.reasoning
    if message.tool_calls is not None:
        result["tool_calls"] = json.loads(message.tool_calls)
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def read_template(files: Mapping[str, bytes], where: str) -> ChatTemplate:
    """Return the template among a model's files, with its special tokens.

    Args:
        files: name -> content.
        where: the model's folder or name, for error messages.

    Raises:
        ModelError: if there is none, or a file is damaged.
    """
    settings = read_object(files, SETTINGS, where)
    special_tokens = _special_tokens(settings, read_object(files, SPECIAL_TOKENS, where))
    return ChatTemplate(_source(files, settings, where), special_tokens, where)


def read_object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a model's file; an empty one if there is no such file.

    Raises:
        ModelError: if the file is not a JSON object.
    """
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{where}: {name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: {name} is not a JSON object")
    return value


def _special_tokens(*settings: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and the like; the first of the settings wins."""
    tokens: dict[str, str] = {}
    for each in reversed(settings):
        for key, value in each.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


def _source(files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> str:
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{where}: {TEMPLATE} is not UTF-8") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ModelError(f"{where} has no chat template: put {TEMPLATE} beside tokenizer.json")
    return template


def _environment() -> jinja2.Environment:
    """Return the sandbox: a template can do nothing but write text."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what the assistant generates."""

        tags = {"generation"}  # noqa: RUF012  jinja2 reads it from the class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE)]
            return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    # No strftime_now: what is trained on would depend on the day.
    return environment
