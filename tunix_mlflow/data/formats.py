"""The formats that examples are read from.

    trace              {"prompt", "steps": [{"content", "type"?}], "answer", "split"?, "meta"?}
    messages           {"messages": [{"role", "content", ...}]}; `conversations` of from/value too
    prompt-completion  {"prompt", "completion"}, texts or lists of messages
    question-answer    {"question", "answer": "work\\n#### result"}
    text               {"text"}

A null is an absent key, but for a message's content. All but `trace` and `text` have `tools`. In
all but `trace`, a column that the form does not know becomes meta.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, messages
from tunix_mlflow.data.examples import TEXT, Example, Message, SplitName, Step
from tunix_mlflow.errors import DatasetError

FORMATS = ("trace", "messages", "prompt-completion", "question-answer", "text")
FIELDS = (
    *("prompt", "steps", "answer", "messages", "completion", "question", "text"),
    *("system", "reasoning", "split", "tools"),
)

_ANSWER_MARK = re.compile(r"^####(?!#)", re.MULTILINE)
_SPLIT = msgspec.json.Decoder(SplitName)


def recognise(columns: Iterable[str]) -> str:
    """Return the format of a record with these columns.

    Raises:
        DatasetError: naming the columns, if they fit no format.
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
    form: str,
    limits: LimitsConfig,
    mapping: Mapping[str, str],
    split: str | None,
    *,
    has_columns: bool,
) -> Callable[[dict[str, Any]], Example]:
    """Return a function from a record to an Example.

    It raises ValueError, with a JSON path, for a record that does not fit.

    Args:
        form: one of FORMATS.
        limits: maximum lengths.
        mapping: field -> the column it is in.
        split: the split of the file, for records that name none.
        has_columns: whether the file gives each call and tool the keys of every other one, as
            nulls.
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
            _check_split(own)
        if has_columns:
            known = {k: messages.without_added_nulls(k, v) for k, v in known.items()}
        tools = None if form == "text" else messages.tools(known)
        example = _FORMS[form](known, limits)
        meta = {**{k: _plain_value(v) for k, v in known.items()}, **meta}
        return msgspec.structs.replace(example, split=own or split, meta=meta, tools=tools)

    def explained(record: dict[str, Any]) -> Example:
        try:
            return read(record)
        except (ValueError, msgspec.ValidationError) as error:
            message = str(error)
            for field, column in mapping.items():
                message = re.sub(rf"\$\.{field}\b", f"$.{column}", message)
            raise ValueError(message) from error

    return explained


def _check_split(name: object) -> None:
    try:
        msgspec.convert(name, SplitName)
    except msgspec.ValidationError:
        raise ValueError(
            f"expected the name of a split, in small letters, digits, `-` and `_`, got {name!r}"
            " - at `$.split`"
        ) from None


def trace_decoder(limits: LimitsConfig) -> Callable[[bytes], Any]:
    """Return a fast decoder of trace lines, for :func:`from_trace`."""
    return cast("Callable[[bytes], Any]", msgspec.json.Decoder(_trace_type(limits)).decode)


def trace_quotes(trace: Any) -> int:
    """Return the number of quotation marks in the line of a trace, if no key was lost."""
    count = 10 + 4 * len(trace.steps)  # prompt, steps and answer; content
    for step in trace.steps:
        count += 2 * (step.i is not UNSET) + 4 * (step.type is not UNSET)
    if trace.meta is not UNSET:
        count += 2 + canonical.quotes(msgspec.json.encode(trace.meta))
    return count + 4 * (trace.split is not UNSET)


def from_trace(trace: Any, split: str | None) -> Example:
    """Return the Example of a decoded trace.

    Raises:
        ValueError: if the steps are not numbered 0, 1, 2, ...
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


def _numbered(raw_steps: list[Any]) -> list[Step]:
    steps = []
    for expected, step in enumerate(raw_steps):
        number = expected if step.i is UNSET else step.i
        if number != expected:
            raise ValueError(f"steps[{expected}].i is {number}, expected {expected}")
        kind = "reasoning" if step.type is UNSET else step.type
        steps.append(Step(i=expected, type=kind, content=step.content))
    return steps


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
    # Parquet reads an integer column with nulls as floats.
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
    """Return dates, which Parquet has and JSON has not, as text."""
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
    return messages.checked(known.pop(field), f"$.{field}", most, least)


def _as_steps(reasoning: str | None, limits: LimitsConfig, path: str) -> tuple[Step, ...]:
    if reasoning is None:
        return ()
    return (Step(i=0, content=messages.checked(reasoning, path, limits.step_characters)),)


def _from_messages(known: dict[str, Any], limits: LimitsConfig) -> Example:
    field = "messages" if "messages" in known else "conversations"
    if field not in known:
        raise ValueError("missing required field `messages` - at `$.messages`")
    turns = messages.turns(known.pop(field), f"$.{field}", limits)
    system = known.pop("system", None)
    if system:
        content = messages.checked(system, "$.system", limits.prompt_characters)
        turns = (Message(role="system", content=content), *turns)
    if not turns[-1].is_assistant:
        raise ValueError(f"the last message must be the assistant's - at `$.{field}`")
    if (reasoning := known.pop("reasoning", None)) is not None:
        if turns[-1].reasoning is not None:
            raise ValueError("the last message has a reasoning of its own - at `$.reasoning`")
        said = messages.checked(reasoning, "$.reasoning", limits.step_characters)
        turns = (*turns[:-1], msgspec.structs.replace(turns[-1], reasoning=said))
    return Example(messages=turns)


def _from_prompt_completion(known: dict[str, Any], limits: LimitsConfig) -> Example:
    field = next((f for f in ("completion", "answer", "response") if f in known), "completion")
    if isinstance(known.get("prompt"), list):
        turns = [*known.pop("prompt")]
        reply = known.pop(field, None)
        given = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
        taken = {"messages": [*turns, *given]}
        for column in ("system", "reasoning"):
            taken |= _take(known, column)
        whole = _from_messages(taken, limits)
        # The prompt is not learned, unless it says so.
        first = len(whole.messages) - len(given)
        prompt_turns = (_unlearned(message) for message in whole.messages[:first])
        return Example(messages=(*prompt_turns, *whole.messages[first:]))
    prompt = _text(known, "prompt", limits.prompt_characters)
    answer = _text(known, field, limits.answer_characters)
    return _single_turn(known, prompt, answer, limits)


def _from_question_answer(known: dict[str, Any], limits: LimitsConfig) -> Example:
    prompt = _text(known, "question", limits.prompt_characters)
    full = _text(known, "answer", limits.answer_characters)
    marks = list(_ANSWER_MARK.finditer(full))
    if not marks:
        return _single_turn(known, prompt, full, limits)
    work, result = full[: marks[-1].start()].rstrip("\n"), full[marks[-1].end() :]
    lines = work.split("\n") if work.strip() else []
    if any(line != line.strip() or not line for line in lines):
        lines = [work]  # its lines are not steps: code, paragraphs
    if len(lines) > limits.steps:
        raise ValueError(f"{len(lines)} steps, at most {limits.steps} - at `$.answer`")
    steps = tuple(
        Step(i=i, content=messages.checked(line, "$.answer", limits.step_characters))
        for i, line in enumerate(lines)
    )
    answer = messages.checked(result.strip(), "$.answer", limits.answer_characters)
    return msgspec.structs.replace(_single_turn(known, prompt, answer, limits), steps=steps)


def _single_turn(known: dict[str, Any], prompt: str, answer: str, limits: LimitsConfig) -> Example:
    turns = [Message(role="user", content=prompt)]
    if known.get("system"):
        system = _text(known, "system", limits.prompt_characters)
        turns.insert(0, Message(role="system", content=system))
    return Example(
        messages=tuple(turns),
        steps=_as_steps(known.pop("reasoning", None), limits, "$.reasoning"),
        answer=answer,
    )


def _unlearned(message: Message) -> Message:
    is_open = message.is_assistant and message.trained is None
    return msgspec.structs.replace(message, trained=False) if is_open else message


def _from_text(known: dict[str, Any], limits: LimitsConfig) -> Example:
    text = _text(known, "text", limits.answer_characters)
    return Example(messages=(Message(role=TEXT, content=text),))


def _take(known: dict[str, Any], field: str) -> dict[str, Any]:
    return {field: known.pop(field)} if field in known else {}


_FORMS: dict[str, Callable[[dict[str, Any], LimitsConfig], Example]] = {
    "messages": _from_messages,
    "prompt-completion": _from_prompt_completion,
    "question-answer": _from_question_answer,
    "text": _from_text,
}
