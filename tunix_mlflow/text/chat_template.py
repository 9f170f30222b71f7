"""The chat template of a pretrained model: Jinja in a sandbox that can only write text."""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tunix_mlflow.config.schema import TODAY
from tunix_mlflow.data import json_text
from tunix_mlflow.data.examples import REASONING, Example, Message
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.files import one_line

if TYPE_CHECKING:
    import jinja2

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
ADDED = "added_tokens_decoder"
"""Key of the settings: id -> token, for each that was added to the tokenizer."""
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private characters around what a template marks
FILES = (TEMPLATE, TOOL_TEMPLATE)
_COUNTED = "_counted_turns"  # called with what each loop goes over
_TURNS = 1_000_000  # of all loops of a rendering; conversations have some thousands
_turns_left = contextvars.ContextVar("turns_left", default=_TURNS)
_REPEATED = 10_000_000  # characters or items
_LARGEST, _EXPONENT = 1_000_000, 64


class Marked(NamedTuple):
    """A rendered text, and what the template marks in it as generated."""

    text: str
    generations: list[tuple[int, int]]  # first character, and the one after the last


class ChatTemplate:
    """A chat template, compiled when it is first used.

    Args:
        source: Jinja text; None: the model has none, and only texts without turns can be used.
        special_tokens: `bos_token` and the like, by the names that templates use.
        where: the model's folder or name, for error messages.
        tool_source: the template for conversations with tools, where the model has one of its own.
        today: what `strftime_now` tells the template: always the same day, since what is trained
            on depends on it.
    """

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str],
        where: str,
        tool_source: str | None = None,
        today: datetime.date = TODAY,
    ) -> None:
        self.source, self.tool_source = source, tool_source
        self.special_tokens, self.where, self.today = special_tokens, where, today

    def on(self, today: datetime.date) -> ChatTemplate:
        """Return the template on another day."""
        if today == self.today:
            return self
        return ChatTemplate(self.source, self.special_tokens, self.where, self.tool_source, today)

    def digest_text(self) -> str:
        """Return what decides the rendering, for a digest."""
        parts = [self.source or "", *([self.tool_source] if self.tool_source else [])]
        if any("strftime_now" in part for part in parts):
            parts.append(self.today.isoformat())
        return "\n\x1f".join(parts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of messages, which are as :meth:`message` makes them.

        Raises:
            DatasetError: if the template refuses the messages, or marks generations and they have
                the private characters that stand for its marks.
            ModelError: if the template is damaged, or there is none.
        """
        text = self._render(messages, tools, add_generation_prompt)
        if not self.marks_generations(tools):
            return text
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> Marked:
        """Return the text of messages, and where the template marks a generation.

        Raises:
            DatasetError: if the template refuses the messages, or they have private characters.
            ModelError: if the template is damaged, or there is none.
        """
        before, *parts = self._render(messages, tools, False).split(_OPEN)
        text, generations = before, []
        for part in parts:
            generated, _, after = part.partition(_CLOSE)
            generations.append((len(text), len(text) + len(generated)))
            text += generated + after
        return Marked(text, generations)

    def marks_generations(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template marks what the assistant generates."""
        return _marks_generations(self._source(tools))

    def message(
        self, message: Message, *, include_steps: bool, inline: bool = False
    ) -> dict[str, Any]:
        """Return a message with the keys that templates know.

        Args:
            message: the message.
            include_steps: whether it has its reasoning.
            inline: whether a thought that the template does not read goes where it reads one, or
                else into the content.
        """
        result: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            result["name"] = message.name
        if message.reasoning is not None and include_steps:
            key = message.reasoning_field or REASONING[0]
            if inline and key not in self._reasoning_keys:
                key = next(iter(self._reasoning_keys), "")
            if key:
                result[key] = message.reasoning
            else:
                thought = f"<think>\n{message.reasoning.strip()}\n</think>\n\n"
                result["content"] = thought + message.text
        if message.tool_calls is not None:
            result["tool_calls"] = json_text.plain(message.tool_calls)
        if message.tool_call_id is not None:
            result["tool_call_id"] = message.tool_call_id
        return result

    @cached_property
    def _reasoning_keys(self) -> list[str]:
        """The names by which the template reads a thought; most have none."""
        source = f"{self.source} {self.tool_source}"
        return [k for k in REASONING if re.search(rf"\.{k}\b|['\"]{k}['\"]", source)]

    def _source(self, tools: Sequence[Any] | None) -> str:
        source = self.tool_source if tools is not None and self.tool_source else self.source
        if source is None:
            raise ModelError(
                f"{self.where} has no chat template: put {TEMPLATE} beside {TOKENIZER}; without"
                " one, only rows of the format text can be used"
            )
        return source

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        import jinja2

        source = self._source(tools)
        if _marks_generations(source):
            said = json.dumps([messages, tools], ensure_ascii=False)
            if _OPEN in said or _CLOSE in said:
                raise DatasetError("a message has the private characters U+E0F0 or U+E0F1")
        _turns_left.set(_TURNS)
        try:
            return _compiled(source).render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.today.strftime,
                **self.special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self.where}: the chat template is damaged: {error}") from error
        except (
            *(jinja2.TemplateError, TypeError, ValueError, AttributeError),
            *(ArithmeticError, LookupError, RuntimeError),
        ) as error:
            reason = one_line(error)
            raise DatasetError(f"{self.where}: the chat template refuses: {reason}") from error


def tools_of(example: Example) -> list[Any] | None:
    """Return the definitions of an example's tools, as templates take them."""
    return None if example.tools is None else json_text.plain(example.tools)


def read_template(files: Mapping[str, bytes], where: str) -> ChatTemplate:
    """Return the template among a model's files, with its special tokens.

    Args:
        files: name -> content.
        where: the model's folder or name, for error messages.

    Raises:
        ModelError: if a file is damaged.
    """
    settings = read_object(files, SETTINGS, where)
    older = read_object(files, SPECIAL_TOKENS, where)
    # As transformers: where the settings list the added tokens, they have all that counts.
    both = (settings, older) if ADDED in settings else (older, settings)
    special_tokens = _special_tokens(*both)
    source, tool_source = _sources(files, settings, where)
    return ChatTemplate(source, special_tokens, where, tool_source)


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
        own = {key: value for key, value in each.items() if key.endswith("_token")}
        extra = each.get("extra_special_tokens")
        for key, value in (own | (extra if isinstance(extra, dict) else {})).items():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
    return tokens


def _sources(
    files: Mapping[str, bytes], settings: Mapping[str, Any], where: str
) -> tuple[str | None, str | None]:
    """Return the template, and that for conversations with tools, if they have one of their own."""
    if any(name in files for name in FILES):  # in place of those in the settings
        both = [_text(files, name, where) if name in files else None for name in FILES]
        return both[0], both[1]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    named = template if isinstance(template, dict) else {"default": template}
    found = [named.get(name) for name in ("default", "tool_use")]
    first, second = (text if isinstance(text, str) else None for text in found)
    return first, second


def _text(files: Mapping[str, bytes], name: str, where: str) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: {name} is not UTF-8") from error


@functools.cache
def _marks_generations(source: str) -> bool:
    import jinja2
    from jinja2 import nodes

    try:
        texts = _environment().parse(source).find_all(nodes.TemplateData)
    except jinja2.TemplateSyntaxError:
        return False  # rendering says so
    return any(_OPEN in text.data for text in texts)


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the sandbox: a template can do nothing but write text. As transformers sets it up."""
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

    class Bounded(ImmutableSandboxedEnvironment):
        """A sandbox in which loops and repeated texts end."""

        intercepted_binops = frozenset(("*", "**"))

        def _parse(self, *arguments: Any) -> nodes.Template:
            tree = super()._parse(*arguments)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Call(nodes.Name(_COUNTED, "load"), [loop.iter], [], None, None)
            tree.set_environment(self)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not (abs(left) <= _LARGEST and abs(right) <= _EXPONENT):
                raise OverflowError("a power that is too large")
            for repeated, times in ((left, right), (right, left)):
                is_text = isinstance(repeated, str | list | tuple) and isinstance(times, int)
                if is_text and len(repeated) * times > _REPEATED:
                    raise OverflowError("a text or list that is too long")
            return super().call_binop(context, operator, left, right)

    def counted(items: Any) -> Any:
        """Take the turns of a loop from those that are left; once for what has a length."""
        try:
            take(len(items))
        except TypeError:  # made while it is read, or nothing to loop over, which the loop says
            return one_by_one(items) if hasattr(items, "__next__") else items
        return items

    def one_by_one(items: Any) -> Any:
        for item in items:
            take(1)
            yield item

    def take(turns: int) -> None:
        left = _turns_left.get() - turns
        if left < 0:
            raise OverflowError(f"more than {_TURNS:,} turns of its loops")
        _turns_left.set(left)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals[_COUNTED] = counted
    return environment
