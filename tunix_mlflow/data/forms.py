"""From the known columns of a row to its example, form by form; see formats for the columns.

Each function takes what it uses out of the row; what it leaves becomes meta.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import messages
from tunix_mlflow.data.examples import TEXT, Example, Message, Step

PROMPTS = ("prompt", "input", "problem")
COMPLETIONS = ("completion", "answer", "response", "output", "solution")
_ANSWER_MARK = re.compile(r"^####(?!#)", re.MULTILINE)
_APART = "\n\n"  # between an instruction and its input, a context and its question

Row = dict[str, Any]


def from_messages(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of a row with `messages` or `conversations`."""
    field = "messages" if "messages" in known else "conversations"
    if field not in known:
        raise ValueError("missing required field `messages` - at `$.messages`")
    turns = messages.turns(known.pop(field), f"$.{field}", limits)
    system = known.pop("system", None)
    if system:
        turns = (_system(system, limits), *turns)
    if not turns[-1].is_assistant:
        raise ValueError(f"the last message must be the assistant's - at `$.{field}`")
    if (reasoning := known.pop("reasoning", None)) is not None:
        if turns[-1].reasoning is not None:
            raise ValueError("the last message has a reasoning of its own - at `$.reasoning`")
        said = messages.checked(reasoning, "$.reasoning", limits, "step_characters")
        turns = (*turns[:-1], msgspec.structs.replace(turns[-1], reasoning=said))
    return Example(messages=turns)


def from_prompt_completion(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of a prompt and a completion, texts or lists of messages."""
    asked, said = _first(known, PROMPTS), _first(known, COMPLETIONS)
    if isinstance(known.get(asked), list):
        reply = known.pop(said, None)
        given = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
        taken = {"messages": [*known.pop(asked), *given]}
        for column in ("system", "reasoning"):
            taken |= _take(known, column)
        whole = from_messages(taken, limits)
        # The prompt is not learned, unless it says so.
        first = len(whole.messages) - len(given)
        prompt_turns = (_unlearned(message) for message in whole.messages[:first])
        return Example(messages=(*prompt_turns, *whole.messages[first:]))
    prompt = _text(known, asked, limits, "prompt_characters")
    answer = _text(known, said, limits, "answer_characters")
    return _single_turn(known, prompt, answer, limits)


def from_instruction(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of an instruction, with its input or context, and the output.

    A `history` of pairs comes before it, as turns.
    """
    prompt = _text(known, "instruction", limits, "prompt_characters")
    field = "input" if "input" in known else "context"
    if known.get(field) == "":
        known.pop(field)
    elif field in known:
        prompt += _APART + _text(known, field, limits, "prompt_characters")
    answer = _text(known, _first(known, ("output", "response")), limits, "answer_characters")
    history = known.pop("history", None)
    if not history:
        return _single_turn(known, prompt, answer, limits)
    turns: list[Row] = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"expected a question and its answer - at `$.history[{number}]`")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    given = {"messages": turns, **_take(known, "system"), **_take(known, "reasoning")}
    return from_messages(given, limits)


def from_question_answer(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of a question, with its context, and an answer after its work.

    Of SQuAD's `answers` the first is the expected one; others become meta.
    """
    prompt = _text(known, "question", limits, "prompt_characters")
    if known.get("context"):
        prompt = _text(known, "context", limits, "prompt_characters") + _APART + prompt
    if "answers" in known and "answer" not in known:
        known["answer"] = _first_of_answers(known)
    full = _text(known, "answer", limits, "answer_characters")
    marks = list(_ANSWER_MARK.finditer(full))
    if not marks:
        return _single_turn(known, prompt, full, limits)
    work, result = full[: marks[-1].start()].rstrip("\n"), full[marks[-1].end() :]
    lines = work.split("\n") if work.strip() else []
    if any(line != line.strip() or not line for line in lines):
        lines = [work]  # its lines are not steps: code, paragraphs
    if len(lines) > limits.steps:
        raise ValueError(
            f"{len(lines)} steps, at most {limits.steps}; raise it with --set"
            f" limits.steps={len(lines)} - at `$.answer`"
        )
    steps = tuple(
        Step(i=i, content=messages.checked(line, "$.answer", limits, "step_characters"))
        for i, line in enumerate(lines)
    )
    answer = messages.checked(result.strip(), "$.answer", limits, "answer_characters")
    return msgspec.structs.replace(_single_turn(known, prompt, answer, limits), steps=steps)


def from_preference(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of a prompt with a chosen and a rejected answer, or with a labelled one.

    Both answers may be whole conversations, which begin with the prompt.
    """
    if "chosen" not in known:
        label = known.pop("label", None)
        if not isinstance(label, bool) and label not in (0, 1):
            raise ValueError("expected true or false - at `$.label`")
        return msgspec.structs.replace(from_prompt_completion(known, limits), label=bool(label))
    both = {name: _turns(known.pop(name), f"$.{name}") for name in ("chosen", "rejected")}
    field = _first(known, PROMPTS)
    prompt = known.pop(field, None)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if asked is not None and not isinstance(asked, list):
        raise ValueError(f"expected a text or a list of messages - at `$.{field}`")
    if asked is None:
        pairs = enumerate(zip(*both.values(), strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(map(len, both.values())))
        asked, both = both["chosen"][:same], {name: turns[same:] for name, turns in both.items()}
    elif all(turns[: len(asked)] == asked for turns in both.values()):
        both = {name: turns[len(asked) :] for name, turns in both.items()}
    if not asked or not all(both.values()):
        raise ValueError("a preference has a prompt and two answers - at `$.chosen`")
    system = _take(known, "system")
    chosen, rejected = (
        from_messages({"messages": [*asked, *turns], **system}, limits).messages
        for turns in both.values()
    )
    return Example(messages=chosen, rejected=rejected[len(chosen) - len(both["chosen"]) :])


def from_text(known: Row, limits: LimitsConfig) -> Example:
    """Return the example of a text without turns."""
    text = _text(known, "text", limits, "answer_characters")
    return Example(messages=(Message(role=TEXT, content=text),))


def _first(known: Row, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in known), names[0])


def _take(known: Row, field: str) -> Row:
    return {field: known.pop(field)} if field in known else {}


def _text(known: Row, field: str, limits: LimitsConfig, limit: str) -> str:
    if field not in known:
        raise ValueError(f"missing required field `{field}` - at `$.{field}`")
    return messages.checked(known.pop(field), f"$.{field}", limits, limit)


def _turns(value: Any, path: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"expected a text or a list of messages - at `{path}`")
    return value


def _first_of_answers(known: Row) -> Any:
    answers = known.pop("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if isinstance(texts, list) and len(texts) > 1:
        known["other_answers"] = texts[1:]
    if not texts:
        raise ValueError("a question without an answer - at `$.answers`")
    return texts[0] if isinstance(texts, list) else texts


def _system(text: Any, limits: LimitsConfig) -> Message:
    content = messages.checked(text, "$.system", limits, "prompt_characters")
    return Message(role="system", content=content)


def _single_turn(known: Row, prompt: str, answer: str, limits: LimitsConfig) -> Example:
    turns = [Message(role="user", content=prompt)]
    if known.get("system"):
        turns.insert(0, _system(known.pop("system"), limits))
    reasoning = known.pop("reasoning", None)
    steps: tuple[Step, ...] = ()
    if reasoning is not None:
        said = messages.checked(reasoning, "$.reasoning", limits, "step_characters")
        steps = (Step(i=0, content=said),)
    return Example(messages=tuple(turns), steps=steps, answer=answer)


def _unlearned(message: Message) -> Message:
    is_open = message.is_assistant and message.trained is None
    return msgspec.structs.replace(message, trained=False) if is_open else message


FORMS: dict[str, Callable[[Row, LimitsConfig], Example]] = {
    "messages": from_messages,
    "prompt-completion": from_prompt_completion,
    "instruction": from_instruction,
    "question-answer": from_question_answer,
    "preference": from_preference,
    "text": from_text,
}
