"""How an answer is written into a completion, and read from one.

With a pretrained model the answer follows ``####``, as in GSM8K (Cobbe et al. 2021); with the
byte tokenizer it follows a marker that is a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunix_mlflow.data.examples import Message

ANSWER_MARK = "####"
_REASONING_END = "</think>"


def write_completion(message: Message, *, include_steps: bool) -> str:
    """Return the text of a completion: reasoning, mark and answer, or the answer alone."""
    if message.reasoning is None or not include_steps:
        return message.text
    return f"{message.reasoning}\n{ANSWER_MARK} {message.text}"


def read_answer(text: str) -> str | None:
    """Return what follows the last mark in a completion; without a mark, all of the text.

    Reasoning that ends with ``</think>`` is left out.

    Returns:
        The answer, stripped, or None if it is empty.
    """
    visible = text.rpartition(_REASONING_END)[2]
    return visible.rpartition(ANSWER_MARK)[2].strip() or None


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
