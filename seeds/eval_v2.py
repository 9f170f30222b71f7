"""eval-v2: a hundred questions for evaluation only, by category and difficulty.

    "A crate holds 6 rows of 4 jars. 3 crack. How many stay whole?"
    -> 6 * 4 = 24; 24 - 3 = 21 -> 21

Five categories, twenty each; every trace is in the split `test`. The wording is not that of the
other seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tunix_mlflow.data.examples import Example, ReasoningTrace, expected_answer, reasoning_trace

DEFAULT_TRACES = 100
CATEGORIES = ("arithmetic", "word_problem", "time", "logic", "text")
DIFFICULTIES = ("easy", "medium", "hard")


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield distinct questions, the categories and the difficulties in turn."""
    if not 1 <= num_traces <= DEFAULT_TRACES:
        raise ValueError(f"num_traces must be from 1 to {DEFAULT_TRACES}")
    makers = (_arithmetic, _word_problem, _time, _logic, _text)
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < num_traces:
        number = len(seen)
        level = number // len(makers) % 3
        prompt, steps, answer = makers[number % len(makers)](rng, level)
        if prompt in seen:
            continue
        seen.add(prompt)
        yield reasoning_trace(
            prompt,
            [("reasoning", step) for step in steps],
            answer,
            split="test",
            meta={
                "category": CATEGORIES[number % len(makers)],
                "difficulty": DIFFICULTIES[level],
            },
        )


def validate(examples: list[Example]) -> None:
    """Raise a ValueError naming the first item that an evaluation set must not have."""
    if not examples:
        raise ValueError("an evaluation set needs at least one item")
    seen: dict[str, int] = {}
    for index, example in enumerate(examples):
        if not example.prompt.strip():
            raise ValueError(f"item {index} has no prompt")
        if example.prompt in seen:
            raise ValueError(f"item {index} repeats the prompt of item {seen[example.prompt]}")
        seen[example.prompt] = index
        if not (expected_answer(example) or "").strip():
            raise ValueError(f"item {index} has no answer")
        for key, known in (("category", CATEGORIES), ("difficulty", DIFFICULTIES)):
            if example.meta.get(key) not in known:
                raise ValueError(f"item {index}: {key} must be one of {', '.join(known)}")
        if example.split != "test":
            raise ValueError(f"item {index} is in the split {example.split!r}, expected 'test'")


_Item = tuple[str, list[str], str]


def _arithmetic(rng: random.Random, level: int) -> _Item:
    top = (9, 30, 99)[level]
    a, b, c = (rng.randint(2, top) for _ in range(3))
    steps = [f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"]
    return f"Evaluate {a} + {b} x {c}", steps, str(a + b * c)


def _word_problem(rng: random.Random, level: int) -> _Item:
    rows, jars = rng.randint(2, 6 + 4 * level), rng.randint(2, 6 + 4 * level)
    cracked = rng.randint(1, rows * jars - 1)
    whole = rows * jars - cracked
    steps = [f"{rows} * {jars} = {rows * jars}", f"{rows * jars} - {cracked} = {whole}"]
    prompt = f"A crate holds {rows} rows of {jars} jars. {cracked} crack. How many stay whole?"
    return prompt, steps, str(whole)


def _time(rng: random.Random, level: int) -> _Item:
    start, length = rng.randrange(6 * 60, 12 * 60), rng.randint(10, 60 + 200 * level)
    end = start + length
    steps = [
        f"the start is minute {start} of the day",
        f"{start} + {length} = {end}",
        f"{end} minutes are {end // 60} hours and {end % 60} minutes",
    ]
    prompt = (
        f"A film begins at {start // 60:02d}:{start % 60:02d} and runs {length} min. When over?"
    )
    return prompt, steps, f"{end // 60:02d}:{end % 60:02d}"


def _logic(rng: random.Random, level: int) -> _Item:
    names = rng.sample(("Kim", "Lou", "Max", "Nia", "Oz", "Pam", "Ray"), 3 + level)
    order = " ahead of ".join(names)
    place = rng.randint(2, len(names) - 1)
    steps = [f"{n + 1}: {name}" for n, name in enumerate(names[:place])]
    return f"In a race: {order}. Who took place {place}?", steps, names[place - 1]


def _text(rng: random.Random, level: int) -> _Item:
    word = "".join(rng.choice("abcdeghiklmnorstu") for _ in range(4 + 2 * level))
    steps = [f"its letters are {', '.join(word)}", f"in order: {', '.join(sorted(word))}"]
    return f"Sort alphabetically the letters of {word}", steps, "".join(sorted(word))
