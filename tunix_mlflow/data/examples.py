"""What is trained on: an Example, and its common case, a ReasoningTrace.

An Example is general (messages with roles, reasoning steps, expected answer, split, meta).
A ReasoningTrace is the line of our own JSONL: one prompt, steps, an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tunix_mlflow.data import canonical
from tunix_mlflow.errors import DatasetError

Text = Annotated[str, Meta(min_length=1, max_length=50_000)]
MAX_LINE = 1_000_000  # bytes


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reasoning step."""

    i: Annotated[int, Meta(ge=0)]
    type: Annotated[str, Meta(min_length=1, max_length=64)] = "reasoning"
    content: Annotated[str, Meta(min_length=1, max_length=20_000)]


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    trained: bool | None = None
    """None: trained on when the role is assistant."""


class Example(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing to learn. With an answer, the completion is steps and answer; without one,
    it is the last message."""

    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    steps: tuple[Step, ...] = ()
    answer: str | None = None
    split: str | None = None
    meta: dict[str, Any] = {}

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


class ReasoningTrace(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of our JSONL."""

    prompt: Text
    steps: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=1_000)]
    answer: Text
    split: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")] | None = None
    meta: dict[str, Any] = {}

    def example(self) -> Example:
        """The same, in the general form."""
        return Example(
            messages=(Message(role="user", content=self.prompt),),
            steps=self.steps,
            answer=self.answer,
            split=self.split,
            meta={key: value for key, value in self.meta.items() if value is not None},
        )


def reasoning_trace(
    prompt: str,
    steps: list[tuple[str, str]],
    answer: str,
    *,
    split: str | None = None,
    meta: dict[str, Any] | None = None,
) -> ReasoningTrace:
    """Shorthand for generators: `steps` are (type, content) pairs, numbered from 0."""
    numbered = tuple(Step(i=i, type=t, content=c) for i, (t, c) in enumerate(steps))
    return ReasoningTrace(
        prompt=prompt, steps=numbered, answer=answer, split=split, meta=meta or {}
    )


def canonical_text(example: Example) -> str:
    """The text whose sha256 is the example's digest.

    Raises:
        ValueError: when a value has no canonical form.
    """
    return canonical.encode(msgspec.to_builtins(example)).decode("utf-8")


def from_canonical(text: str) -> Example:
    """Read back what :func:`canonical_text` wrote.

    Raises:
        DatasetError: if it is not that.
    """
    try:
        return msgspec.json.decode(text, type=Example)
    except msgspec.DecodeError as error:
        raise DatasetError(f"a stored example cannot be read: {error}") from error


def prompt_digest(example: Example) -> str:
    """sha256 of what the model is asked; examples that share it share a split."""
    turns = example.messages
    if example.answer is None:
        turns = turns[:-1]
    return canonical.digest(canonical.encode([[m.role, m.content] for m in turns]))


def to_trace_line(example: Example) -> bytes:
    """One line of our JSONL, without the line's end.

    Raises:
        DatasetError: when the example is not a single prompt with steps and an answer.
    """
    if example.answer is None or len(example.messages) != 1:
        raise DatasetError("only examples of one prompt and an answer have the trace form")
    line: dict[str, Any] = {
        "prompt": example.messages[0].content,
        "steps": msgspec.to_builtins(example.steps),
        "answer": example.answer,
        "meta": example.meta,
    }
    if example.split is not None:
        line["split"] = example.split
    return msgspec.json.encode(line)


def read_traces(path: Path) -> Iterator[ReasoningTrace]:
    """The traces of a JSONL file, one a line; empty lines are errors.

    Raises:
        DatasetError: at the first bad line, naming file, line and field.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    with handle:
        for number, raw in enumerate(handle, start=1):
            yield _parse_line(raw, f"{path}:{number}")


def _parse_line(raw: bytes, where: str) -> ReasoningTrace:
    if len(raw) > MAX_LINE:
        raise DatasetError(f"{where}: the line is longer than {MAX_LINE} bytes")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise DatasetError(f"{where}: starts with a byte-order mark; save the file without it")
    if not raw.strip():
        raise DatasetError(f"{where}: empty line; remove it")
    try:
        tree = canonical.decode(raw.decode("utf-8"))
        _number_steps(tree)
        trace = msgspec.convert(tree, ReasoningTrace)
        canonical.encode(tree)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        message = " ".join(str(error).split())
        raise DatasetError(f"{where}: not a reasoning trace: {message}") from error
    for expected, step in enumerate(trace.steps):
        if step.i != expected:
            raise DatasetError(f"{where}: steps[{expected}].i is {step.i}, expected {expected}")
    return trace


def _number_steps(tree: Any) -> None:
    if isinstance(tree, dict) and isinstance(tree.get("steps"), list):
        for i, step in enumerate(tree["steps"]):
            if isinstance(step, dict):
                step.setdefault("i", i)
