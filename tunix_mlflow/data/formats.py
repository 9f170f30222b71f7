"""The forms that examples come in and go out by.

    trace              {"prompt", "steps": [{"content", "type"?}], "answer", "split"?, "meta"?}
    messages           {"messages": [{"role", "content", ...}]}; `conversations` of from/value too
    prompt-completion  {"prompt", "completion"}, texts or lists of messages
    question-answer    {"question", "answer": "work\\n#### result"}
    text               {"text"}

A null is an absent key. In all but `trace`, a column that the form does not know becomes meta.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical
from tunix_mlflow.data.examples import Example, Message, SplitName, Step, from_canonical
from tunix_mlflow.errors import DatasetError

FORMATS = ("trace", "messages", "prompt-completion", "question-answer", "text")
EXPORTS = ("trace", "messages", "prompt-completion", "gemma")
FIELDS = (
    *("prompt", "steps", "answer", "messages", "completion", "question", "text"),
    *("system", "reasoning", "split"),
)

_THINK = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
_SPLIT = msgspec.json.Decoder(SplitName)


def recognise(columns: Iterable[str]) -> str:
    """The format of a record with these columns.

    Raises:
        DatasetError: naming the columns, when they fit none.
    """
    have = set(columns)
    if have & {"messages", "conversations"}:
        return "messages"
    if {"prompt", "steps"} <= have:
        return "trace"
    if "prompt" in have and have & {"completion", "answer", "response"}:
        return "prompt-completion"
    if {"question", "answer"} <= have:
        return "question-answer"
    if "text" in have:
        return "text"
    named = ", ".join(sorted(have)[:20]) or "none"
    raise DatasetError(
        f"no format fits the columns {named[:300]}; name them with --map, for example"
        " --map prompt=COLUMN --map completion=COLUMN"
    )


def reader(
    form: str, limits: LimitsConfig, mapping: Mapping[str, str], split: str | None
) -> Callable[[dict[str, Any]], Example]:
    """A function from a record to an Example.

    Args:
        form: one of FORMATS.
        limits: lengths that are taken.
        mapping: field -> the column it stands in.
        split: the split of the file, for records that name none.

    The function raises ValueError, with a JSON path, for a record that does not fit.
    """
    trace = _trace_type(limits)
    columns = {column: field for field, column in mapping.items()}

    def read(record: dict[str, Any]) -> Example:
        known = {columns.get(k, k): v for k, v in record.items() if v is not None}
        if form == "trace":
            _number(known)
            return from_trace(msgspec.convert(_drop_nulls(known), trace), split)
        meta = known.pop("meta", {})
        own = known.pop("split", None)
        if not isinstance(meta, dict):
            raise ValueError("Expected `object` - at `$.meta`")
        if own is not None:
            msgspec.convert(own, SplitName)
        example = _FORMS[form](known, limits)
        meta = {**{k: _plain_value(v) for k, v in known.items()}, **meta}
        return msgspec.structs.replace(example, split=own or split, meta=meta)

    def explained(record: dict[str, Any]) -> Example:
        try:
            return read(record)
        except (ValueError, msgspec.ValidationError) as error:
            message = str(error)
            for field, column in mapping.items():
                message = re.sub(rf"\$\.{field}\b", f"$.{column}", message)
            raise ValueError(message) from error

    return explained


def trace_decoder(limits: LimitsConfig) -> Callable[[bytes], Any]:
    """Decode a line of our own JSONL at full speed; for :func:`from_trace`."""
    return cast("Callable[[bytes], Any]", msgspec.json.Decoder(_trace_type(limits)).decode)


def trace_quotes(trace: Any) -> int:
    """The quotation marks of the line that a decoded trace came from, if no key was lost."""
    count = 10 + 4 * len(trace.steps)  # prompt, steps and answer; content
    for step in trace.steps:
        count += 2 * (step.i is not UNSET) + 4 * (step.type is not UNSET)
    if trace.meta is not UNSET:
        count += 2 + canonical.quotes(msgspec.json.encode(trace.meta))
    return count + 4 * (trace.split is not UNSET)


def from_trace(trace: Any, split: str | None) -> Example:
    """The Example of a decoded trace.

    Raises:
        ValueError: when the steps are not numbered 0, 1, 2, ...
    """
    for expected, step in enumerate(trace.steps):
        if step.i != expected or step.type is UNSET:
            steps = _numbered(trace.steps)
            break
    else:
        steps = trace.steps
    return Example(
        messages=(Message(role="user", content=trace.prompt),),
        steps=tuple(steps),
        answer=trace.answer,
        split=split if trace.split is UNSET else trace.split,
        meta={} if trace.meta is UNSET else trace.meta,
    )


def _numbered(given: list[Any]) -> list[Step]:
    steps = []
    for expected, step in enumerate(given):
        number = expected if step.i is UNSET else step.i
        if number != expected:
            raise ValueError(f"steps[{expected}].i is {number}, expected {expected}")
        kind = "reasoning" if step.type is UNSET else step.type
        steps.append(Step(i=expected, type=kind, content=step.content))
    return steps


def writer(form: str) -> Callable[[bytes, str], Any]:
    """A function from canonical bytes and the split to an object that has the form as JSON.

    Args:
        form: one of EXPORTS.

    The function raises a DatasetError for an example that does not fit the form.
    """
    if form == "trace":
        return _to_trace
    shape = _OUT[form]

    def record(text: bytes, split: str) -> dict[str, Any]:
        example = from_canonical(text)
        made = shape(example) | {"split": split}
        return made | {"meta": example.meta} if example.meta else made

    return record


def _trace_type(limits: LimitsConfig) -> type[Struct]:
    # Absent is UNSET, not a default: so an encoded trace has the keys of the line, no more.
    step = msgspec.defstruct(
        "Step",
        [
            ("content", Annotated[str, Meta(min_length=1, max_length=limits.step_characters)]),
            ("i", int | UnsetType, UNSET),
            (
                "type",
                Annotated[str, Meta(min_length=1, max_length=limits.type_characters)] | UnsetType,
                UNSET,
            ),
        ],
        forbid_unknown_fields=True,
        gc=False,
    )
    return msgspec.defstruct(
        "Trace",
        [
            ("prompt", Annotated[str, Meta(min_length=1, max_length=limits.prompt_characters)]),
            ("steps", Annotated[list[step], Meta(min_length=1, max_length=limits.steps)]),  # type: ignore[valid-type]
            ("answer", Annotated[str, Meta(min_length=1, max_length=limits.answer_characters)]),
            ("split", SplitName | UnsetType, UNSET),
            ("meta", dict[str, Any] | UnsetType, UNSET),
        ],
        forbid_unknown_fields=True,
        gc=False,
    )


def _number(known: dict[str, Any]) -> None:
    # Columns of numbers with gaps come as floats.
    steps = known.get("steps")
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and isinstance(step.get("i"), float) and step["i"].is_integer():
            step["i"] = int(step["i"])


def _drop_nulls(value: dict[str, Any]) -> dict[str, Any]:
    steps = value.get("steps")
    if isinstance(steps, list):
        value["steps"] = [
            {k: v for k, v in s.items() if v is not None} if isinstance(s, dict) else s
            for s in steps
        ]
    if "meta" in value and isinstance(value["meta"], dict):
        value["meta"] = {k: _plain_value(v) for k, v in value["meta"].items()}
    return value


def _plain_value(value: Any) -> Any:
    """Parquet has dates; JSON writes them as text."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {k: _plain_value(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain_value(v) for v in value]
    return value


def _text(known: dict[str, Any], field: str, most: int, least: int = 1) -> str:
    if field not in known:
        raise ValueError(f"missing required field `{field}` - at `$.{field}`")
    return _checked(known.pop(field), f"$.{field}", most, least)


def _checked(value: Any, path: str, most: int, least: int = 1) -> str:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{_kind(value)}` - at `{path}`")
    if not least <= len(value) <= most:
        raise ValueError(
            f"Expected `str` of {least} to {most} characters, got {len(value)} - at `{path}`"
        )
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null", bool: "bool"}
    return names.get(type(value), type(value).__name__)


def _think(text: str, reasoning: str | None) -> tuple[str | None, str]:
    """A `<think>` block at the start is reasoning, unless a field has it."""
    found = _THINK.match(text)
    if found is None or reasoning is not None:
        return reasoning, text
    return found[1].strip() or None, text[found.end() :]


def _as_steps(reasoning: str | None, limits: LimitsConfig, path: str) -> tuple[Step, ...]:
    if reasoning is None:
        return ()
    return (Step(i=0, content=_checked(reasoning, path, limits.step_characters)),)


def _from_messages(known: dict[str, Any], limits: LimitsConfig) -> Example:
    field = "messages" if "messages" in known else "conversations"
    if field not in known:
        raise ValueError("missing required field `messages` - at `$.messages`")
    messages = _turns(known.pop(field), f"$.{field}", limits)
    system = known.pop("system", None)
    if system:
        content = _checked(system, "$.system", limits.prompt_characters)
        messages = (Message(role="system", content=content), *messages)
    if messages[-1].role != "assistant":
        raise ValueError(f"the last message must be the assistant's - at `$.{field}`")
    return Example(messages=messages)


def _turns(value: Any, path: str, limits: LimitsConfig) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"Expected `array` of messages, got `{_kind(value)}` - at `{path}`")
    return tuple(_turn(each, f"{path}[{i}]", limits) for i, each in enumerate(value))


def _turn(value: Any, path: str, limits: LimitsConfig) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"Expected `object`, got `{_kind(value)}` - at `{path}`")
    turn = {k: v for k, v in value.items() if v is not None}
    if "from" in turn and "role" not in turn:
        turn["role"], turn["content"] = turn.pop("from"), turn.pop("value", None)
    role = turn.pop("role", None)
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"expected system, user, assistant or tool - at `{path}.role`")
    calls = turn.pop("tool_calls", None) or None
    content = turn.pop("content", None)
    if isinstance(content, list):
        content = _parts(content, f"{path}.content")
    if content is None and calls is not None:
        content = ""
    reasoning = None
    if role == "assistant":
        reasoning = turn.pop("reasoning", None) or turn.pop("reasoning_content", None)
        turn.pop("reasoning_content", None)
    if reasoning is not None:
        reasoning = _checked(reasoning, f"{path}.reasoning", limits.step_characters)
    most = limits.answer_characters if role == "assistant" else limits.prompt_characters
    needed = int(role == "user" or (role == "assistant" and calls is None))
    content = _checked(content, f"{path}.content", most, needed)
    if role == "assistant":
        reasoning, content = _think(content, reasoning)
        _checked(content, f"{path}.content", most, needed)
        _checked(reasoning or "", f"{path}.content", limits.step_characters, 0)
    made = Message(
        role=cast("Literal['system', 'user', 'assistant', 'tool']", role),
        content=content,
        trained=_mark(turn, path),
        reasoning=reasoning,
        tool_calls=None if calls is None else canonical.encode(calls).decode(),
        tool_call_id=_optional(turn, "tool_call_id", path),
        name=_optional(turn, "name", path),
    )
    if turn:
        raise ValueError(f"unknown field `{sorted(turn)[0]}` - at `{path}`")
    return made


def _parts(parts: list[Any], path: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"only parts of text can be used - at `{path}[{i}]`")
        texts.append(part["text"])
    return "".join(texts)


def _optional(turn: dict[str, Any], field: str, path: str) -> str | None:
    value = turn.pop(field, None)
    return None if value is None else _checked(value, f"{path}.{field}", 1_000)


def _mark(turn: dict[str, Any], path: str) -> bool | None:
    """Whether a message is trained on, by any of the names in use."""
    mark: bool | None = None
    for field in ("trained", "train", "training", "weight"):
        if field in turn:
            value = turn.pop(field)
            if value not in (0, 1):
                raise ValueError(f"expected true, false, 0 or 1 - at `{path}.{field}`")
            if mark is not None and mark != bool(value):
                raise ValueError(f"two training marks disagree - at `{path}.{field}`")
            mark = bool(value)
    return mark


def _from_prompt_completion(known: dict[str, Any], limits: LimitsConfig) -> Example:
    field = next((f for f in ("completion", "answer", "response") if f in known), "completion")
    if isinstance(known.get("prompt"), list):
        turns = [*known.pop("prompt")]
        reply = known.pop(field, None)
        turns += reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
        return _from_messages({"messages": turns, **_take(known, "system")}, limits)
    prompt = _text(known, "prompt", limits.prompt_characters)
    answer = _text(known, field, limits.answer_characters)
    return _asked(known, prompt, answer, limits, field)


def _from_question_answer(known: dict[str, Any], limits: LimitsConfig) -> Example:
    prompt = _text(known, "question", limits.prompt_characters)
    full = _text(known, "answer", limits.answer_characters)
    work, mark, result = full.rpartition("####")
    if not mark:
        return _asked(known, prompt, full, limits, "answer")
    lines = [line.strip() for line in work.splitlines() if line.strip()]
    if len(lines) > limits.steps:
        raise ValueError(f"{len(lines)} steps, at most {limits.steps} - at `$.answer`")
    steps = tuple(
        Step(i=i, content=_checked(line, "$.answer", limits.step_characters))
        for i, line in enumerate(lines)
    )
    answer = _checked(result.strip(), "$.answer", limits.answer_characters)
    return msgspec.structs.replace(_asked(known, prompt, answer, limits, "answer"), steps=steps)


def _asked(
    known: dict[str, Any], prompt: str, answer: str, limits: LimitsConfig, field: str
) -> Example:
    messages = [Message(role="user", content=prompt)]
    if known.get("system"):
        system = _text(known, "system", limits.prompt_characters)
        messages.insert(0, Message(role="system", content=system))
    reasoning, answer = _think(answer, known.pop("reasoning", None))
    _checked(answer, f"$.{field}", limits.answer_characters)
    return Example(
        messages=tuple(messages),
        steps=_as_steps(reasoning, limits, "$.reasoning"),
        answer=answer,
    )


def _from_text(known: dict[str, Any], limits: LimitsConfig) -> Example:
    text = _text(known, "text", limits.answer_characters)
    return Example(messages=(Message(role="assistant", content=text),))


def _take(known: dict[str, Any], field: str) -> dict[str, Any]:
    return {field: known.pop(field)} if field in known else {}


_FORMS: dict[str, Callable[[dict[str, Any], LimitsConfig], Example]] = {
    "messages": _from_messages,
    "prompt-completion": _from_prompt_completion,
    "question-answer": _from_question_answer,
    "text": _from_text,
}


_CONTENT, _ROLE, _STEPS = b',"messages":[{"content":', b',"role":"user"}]', b',"steps":[{"content":'


def _to_trace(text: bytes, split: str) -> Raw:
    """The trace form, cut out of the canonical text without reading it: that is ten times as fast.

    The keys stand in the order answer, messages, meta, split, steps. What is looked for has
    quotation marks that no string can hold: there, a backslash stands before them.
    """
    answer, _, rest = text.partition(_CONTENT)
    prompt, one, rest = rest.partition(_ROLE)
    meta, _, steps = rest.rpartition(_STEPS)
    # Of one message alone no key follows the content; the steps end the text, not meta's.
    fits = one and steps[-2:] == b"]}" and answer[:10] == b'{"answer":'
    if not fits or b'","' in prompt[1:-1]:
        raise DatasetError(
            "an example that is not one prompt with steps and an answer has no trace form;"
            " use --format messages"
        )
    if meta[-1:] == b'"':
        meta = meta[: meta.rindex(b',"split":"')]  # its own; the dataset's counts
    own = f',"split":"{split}"'.encode()
    parts = (b'{"prompt":', prompt, _STEPS, steps[:-1], b",", answer[1:], own, meta, b"}")
    return Raw(b"".join(parts))


def _to_messages(example: Example) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for message in example.messages:
        turn = msgspec.to_builtins(message)
        if message.tool_calls is not None:
            turn["tool_calls"] = canonical.decode(message.tool_calls)
        turns.append(turn)
    if example.answer is not None:
        final = {"role": "assistant", "content": example.answer}
        if example.steps:
            final["reasoning"] = "\n".join(step.content for step in example.steps)
        turns.append(final)
    return {"messages": turns}


def _to_prompt_completion(example: Example) -> dict[str, Any]:
    turns = _to_messages(example)["messages"]
    if [turn["role"] for turn in turns] == ["user", "assistant"]:
        completion = turns[1]["content"]
        if turns[1].get("reasoning"):
            completion = f"<think>\n{turns[1]['reasoning']}\n</think>\n{completion}"
        return {"prompt": turns[0]["content"], "completion": completion}
    if len(turns) == 1:
        raise DatasetError("a plain text has no prompt; use --format messages or gemma")
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _to_gemma(example: Example) -> dict[str, Any]:
    """Gemma's turns as text; it has no system role, so that goes before the first prompt."""
    lead, text = "", ""
    for turn in _to_messages(example)["messages"]:
        content = turn["content"]
        if turn["role"] == "system":
            lead += content + "\n\n"
            continue
        if turn["role"] == "assistant" and turn.get("reasoning"):
            content = f"{turn['reasoning']}\n{content}"
        if turn.get("tool_calls"):
            content += canonical.encode(turn["tool_calls"]).decode()
        role = "model" if turn["role"] == "assistant" else "user"
        text += f"<start_of_turn>{role}\n{lead}{content}<end_of_turn>\n"
        lead = ""
    return {"text": text}


_OUT: dict[str, Callable[[Example], dict[str, Any]]] = {
    "messages": _to_messages,
    "prompt-completion": _to_prompt_completion,
    "gemma": _to_gemma,
}
