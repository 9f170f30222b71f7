"""How an answer is written into a completion, and read from one.

With a pretrained model the answer follows ``####``, as in GSM8K (Cobbe et al. 2021); with the
byte tokenizer it follows a marker that is a token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunix_mlflow.data.examples import Message

ANSWER_MARK = "####"
_REASONING_END = "</think>"
_MARK = re.compile(rf"(?<!\S){ANSWER_MARK}(?!#)")


def write_completion(message: Message, *, include_steps: bool) -> str:
    """Return the text of a completion: reasoning, mark and answer, or the answer alone."""
    if message.reasoning is None or not include_steps:
        return message.text
    return f"{message.reasoning}\n{ANSWER_MARK} {message.text}"


def read_answer(text: str, *, marked: bool) -> str | None:
    """Return what follows the last mark in a completion; without a mark, all of the text.

    Reasoning that ends with ``</think>`` is left out. A mark stands at the beginning of a line or
    after white space.

    Args:
        text: of the completion.
        marked: whether completions are known to have a mark. Otherwise it counts only if a single
            line follows, as in GSM8K: it may be a heading.

    Returns:
        The answer, stripped, or None if it is empty.
    """
    visible = text.rpartition(_REASONING_END)[2]
    marks = list(_MARK.finditer(visible))
    if marks:
        answer = visible[marks[-1].end() :].strip()
        if marked or "\n" not in answer:
            return answer or None
    return visible.strip() or None


def answer_ids(ids: Sequence[int], marker_id: int, eos_id: int) -> list[int] | None:
    """Return the ids between the last marker and the end that follows it.

    The marker is compared as an id, so an answer may contain its spelling.

    Returns:
        None if there is no marker.
    """
    tokens = [int(i) for i in ids]
    if marker_id not in tokens:
        return None
    start = len(tokens) - tokens[::-1].index(marker_id)
    stop = tokens.index(eos_id, start) if eos_id in tokens[start:] else None
    return tokens[start:stop]
