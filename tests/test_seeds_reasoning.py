"""dev-reasoning-v1, dev-reasoning-v2 and eval-v2: what they ask, and that it is worked out."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import msgspec
import pytest

from tunix_mlflow.data import seeds
from tunix_mlflow.data.examples import Example
from tunix_mlflow.errors import DatasetError

COUNTS = {"dev-reasoning-v1": 200, "dev-reasoning-v2": 550, "eval-v2": 100}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def find(key: str) -> seeds.Seed:
    seed = seeds.find(key)
    assert seed is not None
    return seed


def build(key: str, number: int = 42, count: int | None = None) -> list[Example]:
    return seeds.examples(find(key), seed=number, count=count or COUNTS[key])


def of(key: str, kind: str, value: str) -> list[Example]:
    found = [e for e in build(key) if e.meta[kind] == value]
    assert len(found) >= 20
    return found


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def contents(example: Example) -> list[str]:
    return [step.content for step in example.steps]


def runs(prompt: str) -> set[tuple[str, ...]]:
    words = prompt.lower().split()
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


@pytest.mark.parametrize("key", COUNTS)
def test_the_random_seed_alone_decides(key: str) -> None:
    """Same seed equal, also after another was drawn; other seed different."""
    first, other = build(key), build(key, 43)
    assert build(key) == first != other


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("count", [1, 7, None])
def test_as_many_as_asked_and_no_prompt_twice(key: str, count: int | None) -> None:
    """One, a few or the default number; each with two to six numbered steps."""
    assert find(key).default_traces == COUNTS[key]
    found = build(key, count=count)
    assert len({e.prompt for e in found}) == len(found) == (count or COUNTS[key])
    for example in found:
        assert 2 <= len(example.steps) <= 6
        assert [step.i for step in example.steps] == list(range(len(example.steps)))


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("count", [-1, 0, 1_000_000])
def test_a_count_out_of_range_is_refused(key: str, count: int) -> None:
    """Before anything is drawn, and the message gives the range."""
    with pytest.raises(DatasetError, match="num_traces must be from 1 to"):
        seeds.examples(find(key), seed=42, count=count)


def test_families_and_difficulties() -> None:
    """The training sets have two and five families in equal parts, difficulties from 1 to 3."""
    for key, families in (("dev-reasoning-v1", 2), ("dev-reasoning-v2", 5)):
        found = build(key)
        counts = Counter(e.meta["family"] for e in found)
        assert set(counts.values()) == {COUNTS[key] // families}
        assert len(counts) == families
        assert {e.meta["difficulty"] for e in found} <= {1, 2, 3}


def test_change_and_shopping_lead_from_step_to_step() -> None:
    """dev-reasoning-v1: each step uses the prompt's numbers and the results before it."""
    for example in of("dev-reasoning-v1", "family", "change"):
        a, b, c = numbers(example.prompt)
        assert contents(example) == [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]
        assert example.answer == str(a + b - c)
    for example in of("dev-reasoning-v1", "family", "shopping"):
        a, p, b, q, paid = numbers(example.prompt)
        pens, pads = a * p, b * q
        assert contents(example) == [
            f"{a} * {p} = {pens}",
            f"{b} * {q} = {pads}",
            f"{pens} + {pads} = {pens + pads}",
            f"{paid} - {pens + pads} = {paid - pens - pads}",
        ]
        assert example.answer == str(paid - pens - pads)


def test_expressions_lead_from_step_to_step() -> None:
    """dev-reasoning-v2: brackets first, then the product, then the difference."""
    for example in of("dev-reasoning-v2", "family", "expression"):
        a, b, c, d = numbers(example.prompt)
        total = sum([a + b] * c)
        assert contents(example) == [
            f"{a} + {b} = {a + b}",
            f"{a + b} * {c} = {total}",
            f"{total} - {d} = {total - d}",
        ]
        assert example.answer == str(total - d)


def test_weekdays_are_counted_one_by_one() -> None:
    """dev-reasoning-v2: weeks and rest make the days; every day named is the one it should be."""
    for example in of("dev-reasoning-v2", "family", "weekday"):
        (ahead,) = numbers(example.prompt)
        at = start = next(i for i, day in enumerate(DAYS) if day in example.prompt)
        for _ in range(ahead):
            at = (at + 1) % 7
        assert example.answer == DAYS[at]
        split, _, *named = contents(example)
        days, weeks, rest = numbers(split)
        assert days == ahead == weeks * 7 + rest
        assert rest < 7
        for step in named:
            (on,) = numbers(step)
            assert step == f"{on} on is {DAYS[(start + on) % 7]}"
        assert example.steps[-1].content.endswith(DAYS[at])


def test_evaluation_arithmetic_and_words_lead_from_step_to_step() -> None:
    """eval-v2: the product comes first, the second step goes on from it."""
    for example in of("eval-v2", "category", "arithmetic"):
        a, b, c = numbers(example.prompt)
        assert contents(example) == [f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"]
        assert example.answer == str(a + b * c)
    for example in of("eval-v2", "category", "word_problem"):
        rows, jars, cracked = numbers(example.prompt)
        all_jars = rows * jars
        assert contents(example) == [
            f"{rows} * {jars} = {all_jars}",
            f"{all_jars} - {cracked} = {all_jars - cracked}",
        ]
        assert example.answer == str(all_jars - cracked)


def test_evaluation_times_places_and_letters() -> None:
    """eval-v2: the clock, the place in the race and the sorted letters are right."""
    for example in of("eval-v2", "category", "time"):
        hour, minute, length = numbers(example.prompt.replace(":", " "))
        for _ in range(length):
            hour, minute = (hour + 1, 0) if minute == 59 else (hour, minute + 1)
        assert example.answer == f"{hour:02d}:{minute:02d}"
        assert hour < 24
        assert example.steps[-1].content.endswith(f" {hour} hours and {minute} minutes")
    for example in of("eval-v2", "category", "logic"):
        order = example.prompt.split(": ")[1].split(". ")[0].split(" ahead of ")
        (place,) = numbers(example.prompt)
        assert len(set(order)) == len(order)
        assert contents(example) == [f"{i + 1}: {order[i]}" for i in range(place)]
        assert example.answer == order[place - 1]
    for example in of("eval-v2", "category", "text"):
        word, answer = example.prompt.split()[-1], example.answer or ""
        assert Counter(answer) == Counter(word)
        assert all(a <= b for a, b in itertools.pairwise(answer))


def test_the_evaluation_set_is_balanced() -> None:
    """Twenty of each category; within one, the difficulties differ by one item at most."""
    found = build("eval-v2")
    assert {e.split for e in found} == {"test"}
    by_category = Counter(e.meta["category"] for e in found)
    assert sorted(by_category.values()) == [20] * 5
    cells = Counter((e.meta["category"], e.meta["difficulty"]) for e in found)
    assert {difficulty for _, difficulty in cells} == {"easy", "medium", "hard"}
    assert len(cells) == 15
    assert set(cells.values()) == {6, 7}


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"answer": None}, "item 5 has no answer"),
    "empty answer": ({"answer": ""}, "item 5 has no answer"),
    "no category": ({"meta": {"difficulty": "easy"}}, "item 5: category"),
    "unknown category": ({"meta": {"category": "art", "difficulty": "easy"}}, "item 5: category"),
    "no difficulty": ({"meta": {"category": "logic"}}, "item 5: difficulty"),
    "number for difficulty": (
        {"meta": {"category": "logic", "difficulty": 1}},
        "item 5: difficulty",
    ),
    "no split": ({"split": None}, "item 5 is in the split None"),
    "other split": ({"split": "validation"}, "item 5 is in the split 'validation'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_validator_names_the_damaged_item(kind: str) -> None:
    """What is built passes; with one item damaged it does not, even in the middle of the set."""
    validate = find("eval-v2").validate
    assert validate is not None
    found = build("eval-v2")
    validate(found)
    changes, message = DAMAGE[kind]
    found[5] = msgspec.structs.replace(found[5], **changes)
    with pytest.raises(ValueError, match=message):
        validate(found)


def test_the_validator_refuses_an_empty_set_and_a_repeated_prompt() -> None:
    """Neither a count of 0 nor the same question twice; the repeated item is named."""
    validate = find("eval-v2").validate
    assert validate is not None
    with pytest.raises(ValueError, match="at least one item"):
        validate([])
    found = build("eval-v2")
    with pytest.raises(ValueError, match="item 100 repeats the prompt of item 7"):
        validate([*found, found[7]])


@pytest.mark.parametrize("number", [42, 43])
def test_evaluation_shares_no_prompt_and_no_run_of_words(number: int) -> None:
    """No prompt and no eight words in a row, also with ten times as much to train on."""
    evaluated = build("eval-v2", number)
    trained = [*build("dev-reasoning-v1", count=2000), *build("dev-reasoning-v2", count=5500)]
    assert not {e.prompt for e in evaluated} & {e.prompt for e in trained}
    seen = set().union(*(runs(e.prompt) for e in trained))
    shared = [e.prompt for e in evaluated if runs(e.prompt) & seen]
    assert not shared
    assert sum(bool(runs(e.prompt)) for e in evaluated) >= 60  # long enough to share one


@pytest.mark.parametrize(
    ("key", "most"), [("dev-reasoning-v1", 20_000), ("dev-reasoning-v2", 6_600)]
)
def test_the_most_that_is_stated_can_be_made(key: str, most: int) -> None:
    """As many distinct prompts as the range says, and not one more."""
    assert len({e.prompt for e in build(key, count=most)}) == most
    with pytest.raises(DatasetError, match=f"to {most:,}"):
        seeds.examples(find(key), seed=42, count=most + 1)
