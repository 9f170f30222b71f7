"""The conversations that templates are tried with: each messages, and tools or None."""

from __future__ import annotations

from typing import Any

TODAY = "2024-07-26"
"""The day of `strftime_now`, here as in training."""

_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "description": "Name of the town"},
                    "days": {"type": "integer", "description": "How many days ahead"},
                },
                "required": ["town"],
            },
        },
    }
]


def _call(content: str | None, /, **arguments: Any) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_SYSTEM = {"role": "system", "content": "Be brief and kind."}
_ANSWER = {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "rain, 5"}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "single": ([_user("What is it?"), _reply("It is all.")], None),
    "multi-turn": (
        [_user("hi there"), _reply("hello\n\nyou"), _user("is it?"), _reply("it is so")],
        None,
    ),
    "system": ([_SYSTEM, _user("Who?"), _reply("Nobody else.")], None),
    "system multi-turn": (
        [_SYSTEM, _user("Who?"), _reply("Nobody else."), _user("Why?"), _reply("No reason.")],
        None,
    ),
    "tools unused": ([_user("Sing."), _reply("La la.")], _TOOLS),
    "call": ([_user("Weather?"), _call("", town="Oslo", days=2)], _TOOLS),
    "call with null content": ([_user("Weather?"), _call(None, town="Bodø", days=2)], _TOOLS),
    "call with content": ([_user("Weather?"), _call("Let me see.", town="Oslo")], _TOOLS),
    "call, reply, answer": (
        [_user("Weather?"), _call("", town="Oslo"), _ANSWER, _reply("Wet, 5 degrees.")],
        _TOOLS,
    ),
    "call, reply, answer, null content": (
        [_SYSTEM, _user("Weather?"), _call(None, town="Oslo"), _ANSWER, _reply("Wet, 5 degrees.")],
        _TOOLS,
    ),
    "inline thought": (
        [_user("30+1?"), _reply("<think>\nI add one to 30.\n</think>\n\n31")],
        None,
    ),
    "inline thoughts, multi-turn": (
        [
            _user("30+1?"),
            _reply("<think>\nI add one to 30.\n</think>\n\n31"),
            _user("and 1?"),
            _reply("<think>\nOnce more.\n</think>\n\n32"),
        ],
        None,
    ),
    "thought as a field": (
        [_user("30+1?"), _reply("31 apples", reasoning_content="I add one to 30.")],
        None,
    ),
    "thoughts as fields, multi-turn": (
        [
            _user("30+1?"),
            _reply("31 apples", reasoning_content="I add one to 30."),
            _user("and 1?"),
            _reply("32 apples", reasoning_content="Once more."),
        ],
        None,
    ),
    "thought and call": (
        [
            _user("Weather?"),
            _call("", town="Oslo") | {"reasoning_content": "I must look."},
            _ANSWER,
            _reply("Wet, 5 degrees.", reasoning_content="It rains there."),
        ],
        _TOOLS,
    ),
    "assistant twice": (
        [_user("Count."), _reply("one two"), _reply("three four"), _user("more"), _reply("five")],
        None,
    ),
    "non-ASCII": ([_user("Grüße, 世界?"), _reply("Ça va, 🙂 naïve")], None),
    "leading newlines": ([_user("\n\nhello "), _reply("\n\n  indented\n\nand more \n")], None),
    "quotes and markup": (
        [_user("Say \"<b>\" & 'it'"), _reply('It is "<b>bold</b>" & \\n stays {{ x }}')],
        None,
    ),
    "nested arguments": (
        [
            _user("Weather?"),
            _call("", town='Å "quoted"', days=[1, 2.5, {"b": None, "a": True}]),
            _ANSWER,
            _reply("Done <now>."),
        ],
        _TOOLS,
    ),
}
