"""The formats that examples are read from.

    trace              {"prompt", "steps": [{"content", "type"?}], "answer", "split"?, "meta"?}
    messages           {"messages": [{"role", "content", ...}]}; `conversations` of from/value too
    prompt-completion  {"prompt", "completion"}, texts or lists of messages; input and output,
                       problem and solution
    instruction        {"instruction", "input" or "context", "output" or "response", "history"}
    question-answer    {"question", "context"?, "answer": "work\\n#### result", or "answers"}
    preference         {"prompt", "chosen", "rejected"}, or {"prompt", "completion", "label"}
    text               {"text"}

A null is an absent key, but for a message's content. All but `trace` and `text` have `tools`. In
all but `trace`, a column that the form does not know becomes meta.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, messages
from tunix_mlflow.data.column_map import apply
from tunix_mlflow.data.examples import Example, Message, SplitName, Step
from tunix_mlflow.data.forms import COMPLETIONS, FORMS, PROMPTS
from tunix_mlflow.errors import DatasetError

FORMATS = ("trace", *FORMS)
FIELDS = (
    *("prompt", "steps", "answer", "messages", "completion", "question", "context", "text"),
    *("instruction", "input", "output", "history", "chosen", "rejected", "label"),
    *("system", "reasoning", "split", "tools"),
)
"""The columns that --map can name."""

_LONG = 32  # characters of a text that somebody may have meant to be trained on
_SPLIT = msgspec.json.Decoder(SplitName)


def recognise(row: Mapping[str, Any]) -> str:
    """Return the format of a row, by its columns.

    Args:
        row: column -> value; nulls do not count.

    Raises:
        DatasetError: naming the columns, if they fit no format.
    """
    have = {column for column, value in row.items() if value is not None}
    asks, says = have & set(PROMPTS), have & set(COMPLETIONS)
    if {"chosen", "rejected"} <= have or (asks and says and isinstance(row.get("label"), bool)):
        return "preference"
    if have & {"messages", "conversations"}:
        return "messages"
    if {"prompt", "steps"} <= have:
        return "trace"
    if "instruction" in have and have & {"output", "response"}:
        return "instruction"
    if "question" in have and have & {"answer", "answers"}:
        return "question-answer"
    if asks and says:
        return "prompt-completion"
    if "text" in have:
        return "text"
    named = ", ".join(sorted(have)[:20]) or "none"
    raise DatasetError(
        f"no format fits the columns {named[:300]}; name them with --map, for example"
        " --map prompt=COLUMN --map completion=COLUMN, or join them, for example"
        r" --map 'prompt={TITLE}\n\n{BODY}'"
    )


def reader(
    form: str,
    limits: LimitsConfig,
    mapping: Mapping[str, str],
    split: str | None,
    *,
    has_columns: bool,
    unused: dict[str, int] | None = None,
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
        unused: is given the characters of long texts that become meta, by column.
    """
    trace = _trace_type(limits)

    def read(record: dict[str, Any]) -> Example:
        known = apply(mapping, {k: v for k, v in record.items() if v is not None})
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
        example = FORMS[form](known, limits)
        if unused is not None:
            for column, value in known.items():
                if isinstance(value, str) and len(value) >= _LONG:
                    unused[column] = unused.get(column, 0) + len(value)
        meta = {**{k: _plain_value(v) for k, v in known.items()}, **meta}
        return msgspec.structs.replace(example, split=own or split, meta=meta, tools=tools)

    def explained(record: dict[str, Any]) -> Example:
        try:
            return read(record)
        except (ValueError, msgspec.ValidationError) as error:
            message = str(error)
            for field, column in mapping.items():
                if "{" in column:
                    continue
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
    if isinstance(value, float) and value != value:
        return None  # a table's missing number
    if isinstance(value, dict):
        return {k: _plain_value(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain_value(v) for v in value]
    return value
