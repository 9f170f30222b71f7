"""A row's messages, with their calls, and its definitions of tools.

What is said is kept as it stands: nothing is cut out of a content, and calls and definitions of
tools keep the row's order of keys and its spelling of numbers, since templates write them out.
"""

from __future__ import annotations

from typing import Any

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import json_text
from tunix_mlflow.data.examples import REASONING, ROLES, Message

_SYNONYMS = {"human": "user", "gpt": "assistant", "model": "assistant"}
_CONVERSATIONS = ("messages", "conversations", "prompt", "completion", "answer", "response")


def turns(value: Any, path: str, limits: LimitsConfig) -> tuple[Message, ...]:
    """Return the messages of a row.

    Args:
        value: the list, as it was read, or its JSON text.
        path: its JSON path, for errors.
        limits: maximum lengths.

    Raises:
        ValueError: with a JSON path, if it is no list of messages.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list) or not value:
        got = "an empty one" if value == [] else f"`{_kind(value)}`"
        raise ValueError(f"Expected `array` of messages, got {got} - at `{path}`")
    return tuple(_turn(each, f"{path}[{i}]", limits) for i, each in enumerate(value))


def tools(known: dict[str, Any]) -> str | None:
    """Take a row's definitions of tools, and return them as JSON; None if it has none.

    Raises:
        ValueError: if they are no list of objects.
    """
    if known.get("tools") and known.get("functions"):
        raise ValueError("tools are given as `tools` too - at `$.functions`")
    field = "tools" if known.get("tools") or "functions" not in known else "functions"
    found = known.pop(field, None)
    known.pop("tools", None)
    if isinstance(found, str) and found:
        found = _parsed(found)
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise ValueError(f"Expected `array` of objects, or its JSON text - at `$.{field}`")
    if field == "functions":
        found = [{"type": "function", "function": tool} for tool in found]
    return _json(found, f"$.{field}")


def without_added_nulls(field: str, value: Any) -> Any:
    """Return a field of a file with columns without the keys that other rows' calls brought."""
    if field in ("tools", "functions"):
        return json_text.without_nulls(value)
    if field in _CONVERSATIONS and isinstance(value, list):
        return [
            {k: v if k == "content" else json_text.without_nulls(v) for k, v in turn.items()}
            if isinstance(turn, dict)
            else turn
            for turn in value
        ]
    return value


def checked(value: Any, path: str, limits: LimitsConfig, limit: str, least: int = 1) -> str:
    """Return a text of `least` to as many characters as a limit allows.

    Args:
        value: what should be a text.
        path: its JSON path, for errors.
        limits: maximum lengths.
        limit: which of them is its own.
        least: fewest characters.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{_kind(value)}` - at `{path}`")
    most = getattr(limits, limit)
    if least <= len(value) <= most:
        return value
    remedy = f"; raise it with --set limits.{limit}={len(value)}" if len(value) > most else ""
    raise ValueError(
        f"Expected `str` of {least} to {most} characters, got {len(value)}{remedy} - at `{path}`"
    )


def _turn(value: Any, path: str, limits: LimitsConfig) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"Expected `object`, got `{_kind(value)}` - at `{path}`")
    if "from" in value and "role" not in value:
        value = _from_value(value)
    if "content" not in value and value.get("role") == "user":
        raise ValueError(f"missing required field - at `{path}.content`")
    content = value.get("content", "")
    turn = {k: v for k, v in value.items() if v is not None and k != "content"}
    role = turn.pop("role", None)
    role = _SYNONYMS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"expected one of {', '.join(ROLES)} - at `{path}.role`")
    if isinstance(content, list):
        content = _parts(content, f"{path}.content")
    calls = _calls(turn, path)
    reasoning, reasoning_field = _reasoning(turn, role, path, limits)
    limit = "answer_characters" if role == "assistant" else "prompt_characters"
    needed = int(role == "user" or (role == "assistant" and calls is None))
    if content is not None or calls is None:
        content = checked(content, f"{path}.content", limits, limit, needed)
    message = Message(
        role=role,
        content=content,
        trained=_mark(turn, path),
        reasoning=reasoning,
        reasoning_field=reasoning_field,
        tool_calls=calls,
        tool_call_id=_optional(turn, "tool_call_id", path),
        name=_optional(turn, "name", path),
    )
    if turn:
        raise ValueError(f"unknown field `{sorted(turn)[0]}` - at `{path}`")
    return message


def _reasoning(
    turn: dict[str, Any], role: str, path: str, limits: LimitsConfig
) -> tuple[str | None, str | None]:
    """Take a turn's reasoning, and the name of its field if it is not the usual one."""
    thoughts = {name: turn.pop(name) for name in REASONING if name in turn}
    thoughts = {name: text for name, text in thoughts.items() if text != ""}
    if not thoughts:
        return None, None
    first, text = next(iter(thoughts.items()))
    if role != "assistant":
        raise ValueError(f"only the assistant has reasoning - at `{path}.{first}`")
    for name, other in thoughts.items():
        if other != text:
            raise ValueError(f"two fields of reasoning disagree - at `{path}.{name}`")
    reasoning = checked(text, f"{path}.{first}", limits, "step_characters")
    return reasoning, None if first == REASONING[0] else first


def _from_value(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of ShareGPT's keys `from` and `value` with the usual ones.

    A call is the assistant's, written as JSON; what a tool replies to it is an observation.
    """
    result = {k: v for k, v in turn.items() if k not in ("from", "value")}
    role, value = turn["from"], turn.get("value")
    if role == "function_call" and isinstance(value, str):
        call = _parsed(value)
        calls = call if isinstance(call, list) else [call]
        if all(isinstance(each, dict) and "name" in each for each in calls):
            functions = [{"type": "function", "function": each} for each in calls]
            return {"role": "assistant", "content": "", "tool_calls": functions, **result}
    return {"role": "tool" if role == "observation" else role, "content": value, **result}


def _calls(turn: dict[str, Any], path: str) -> str | None:
    """Take a turn's calls, and return them as JSON; arguments that are JSON text are parsed."""
    calls = turn.pop("tool_calls", None)
    single = turn.pop("function_call", None)  # OpenAI's older name
    if isinstance(calls, str):
        calls = _parsed(calls)
    if single is not None:
        calls = [*(calls or []), {"type": "function", "function": single}]
    if not calls:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(
            f"Expected `array` of calls, got `{_kind(calls)}` - at `{path}.tool_calls`"
        )
    return _json([_with_arguments(call) for call in calls], f"{path}.tool_calls")


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call, or its function, with its arguments as an object where they are one."""
    if isinstance(call.get("function"), dict):
        call = call | {"function": _with_arguments(call["function"])}
    if isinstance(call.get("arguments"), str):
        arguments = _parsed(call["arguments"])
        if isinstance(arguments, dict):
            call = call | {"arguments": arguments}
    return call


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; the text itself if it is none."""
    try:
        return json_text.parse(text)
    except ValueError:
        return text


def _json(value: Any, path: str) -> str:
    try:
        return json_text.encode(value)
    except ValueError as error:
        raise ValueError(f"{error} - at `{path}`") from error


def _parts(parts: list[Any], path: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"only parts of text can be used - at `{path}[{i}]`")
        texts.append(part["text"])
    return "".join(texts)


def _optional(turn: dict[str, Any], field: str, path: str) -> str | None:
    value = turn.pop(field, None)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= 1_000:
        raise ValueError(f"Expected `str` of 1 to 1000 characters - at `{path}.{field}`")
    return value


def _mark(turn: dict[str, Any], path: str) -> bool | None:
    """Return whether a message is trained on, by any of the names in use."""
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


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null", bool: "bool"}
    return names.get(type(value), type(value).__name__)
