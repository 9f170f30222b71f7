"""Random conversations in which no word occurs twice, and what is trained on of them."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from tunix_mlflow.config.schema import DataConfig, LimitsConfig
from tunix_mlflow.data import formats
from tunix_mlflow.errors import TunixMlflowError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

REFUSED = "refused"


def conversation(number: int) -> dict[str, Any]:
    """A row: turns of any kind in an order that chats have, each word of its own."""
    rng = random.Random(number)
    words = (f"w{n}x" for n in itertools.count(10))

    def text(most: int = 3) -> str:
        return " ".join(next(words) for _ in range(rng.randint(1, most)))

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": text()})
    with_tools = rng.random() < 0.5
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        if with_tools and rng.random() < 0.6:
            function = {"name": next(words), "arguments": {next(words): text()}}
            content = rng.choice([None, "", text()])
            call = {"id": "call00001", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": content, "tool_calls": [call]})
            reply = {"role": "tool", "name": function["name"], "tool_call_id": "call00001"}
            messages.append(reply | {"content": text()})
        said: dict[str, Any] = {"role": "assistant", "content": text()}
        if rng.random() < 0.3:
            said["reasoning_content"] = text()
        elif rng.random() < 0.3:
            said["content"] = f"<think>\n{text()}\n</think>\n\n{said['content']}"
        if rng.random() < 0.15:
            said["trained"] = False
        messages.append(said)
        if rng.random() < 0.1:
            messages.append({"role": "assistant", "content": text()})
    row: dict[str, Any] = {"messages": messages}
    if with_tools:
        definition = {"name": next(words), "description": text(), "parameters": {}}
        row["tools"] = [{"type": "function", "function": definition}]
    return row


def wrong(tokenizer: HubTokenizer, row: dict[str, Any], config: DataConfig) -> str | None:
    """What is trained on and should not be, or the other way round; REFUSED; or None."""
    read = formats.reader("messages", LimitsConfig(), {}, None, has_columns=False)
    example = read(json.loads(json.dumps(row)))
    try:
        ids, trained, findings = tokenizer.encode_example(example, config)
    except TunixMlflowError:
        return REFUSED
    if any(finding.refuses for finding in findings):
        return REFUSED
    text = tokenizer.decode(ids[trained], skip_special_tokens=False)
    for message in row["messages"]:
        own = message["role"] == "assistant" and message.get("trained") is not False
        names = {message["name"]} if "name" in message else set()  # said by the call before
        for word in _words({k: v for k, v in message.items() if k != "tool_call_id"}) - names:
            if (word in text) != own:
                return f"{word} of {message} is {'not ' if own else ''}trained on: {text}"
    found = next((w for w in _words(row.get("tools")) if w in text), None)
    return None if found is None else f"{found} of a tool is trained on: {text}"


def _words(value: Any) -> set[str]:
    tokens = json.dumps(value, ensure_ascii=False).replace('"', " ").replace("\\n", " ").split()
    return {t for t in tokens if t.startswith("w") and t.endswith("x")}
