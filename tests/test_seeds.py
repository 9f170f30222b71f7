"""The built-in datasets."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import msgspec
import pytest

from tests.conftest import ROOT
from tunix_mlflow.data import datasets, seeds
from tunix_mlflow.data.examples import Example, ReasoningTrace
from tunix_mlflow.errors import DatasetError

DIGESTS = {
    "golden-v1": "ce926aaa12a2719bfd51f296fb4ade79d81b4fc1c8ae9c9d8eb6d660cd850716",
    "golden-v2": "fc92b3ae18239abbe8c1db5fb7ffa314dc8337182e402220acaf872d5c0261e3",
    "column-addition-v1": "3219ac0a67be28c6ecb19db8194f79eb20ead764e9bc71fbef5cbf495d9f9597",
    "dev-reasoning-v1": "9171a2a289b84446aef23ffd6014e05728de2dfb269bc57ad3815d75d0111029",
    "dev-reasoning-v2": "cf0843b329f7783f39914261e9dcaac0937926ce0aeadc85f9568f99e6b4a4b4",
    "eval-v2": "53537cf17ca9e9adff0b191fe5c61833aac050de5b31ffa56c5cb1d4c3c97f92",
}


def generate(key: str, number: int = 42, count: int | None = None) -> list[ReasoningTrace]:
    seed = seeds.find(key)
    assert seed is not None
    count = count or seed.default_traces
    made = list(seed.generate(seed=number, num_traces=count))
    assert all(isinstance(trace, ReasoningTrace) for trace in made)
    return made  # type: ignore[return-value]


def test_every_file_is_a_seed_with_a_pinned_digest() -> None:
    """No seed comes without its digest standing here."""
    assert set(seeds.names()) == set(DIGESTS)
    assert len(list((ROOT / "seeds").glob("*.py"))) == len(DIGESTS)


@pytest.mark.parametrize("key", DIGESTS)
def test_seeding_is_idempotent_and_its_digest_pinned(key: str) -> None:
    """The same content under the same digest, however often, on any machine."""
    built = datasets.seed(key)
    assert built.created
    assert built.manifest.digest == DIGESTS[key]
    again = datasets.seed(key)
    assert not again.created
    assert again.manifest == built.manifest
    assert datasets.verify(key).ok


@pytest.mark.parametrize("key", sorted(set(DIGESTS) - {"golden-v1"}))
def test_the_random_seed_decides(key: str) -> None:
    """Same seed equal, another seed different."""
    assert generate(key, 42, 50) == generate(key, 42, 50)
    assert generate(key, 42, 50) != generate(key, 43, 50)


def test_golden_v1_holds_the_five_cases() -> None:
    """Prompts, answers and cases as they were specified."""
    traces = generate("golden-v1")
    assert [(t.prompt, t.answer, t.meta["case"]) for t in traces] == [
        ("What is 2+2?", "4", "basic_math"),
        ("Capital of France?", "Paris", "knowledge"),
        ("  Normalize  Whitespace  ", "normalize whitespace", "normalization"),
        ("Answer Format Test", "Answer: Correct", "format"),
        ("Is this correct?", "Yes", "boolean"),
    ]
    assert all(t.steps and t.meta["golden"] == "v1" for t in traces)


def test_golden_v2_is_sums_then_repetitions() -> None:
    """Half and half, drawn in the specified order, 67 distinct prompts, said in its statistics."""
    traces = generate("golden-v2")
    assert len(traces) == 100
    for idx, trace in enumerate(traces):
        (step,) = trace.steps
        assert trace.meta["idx"] == idx
        if idx < 50:
            a, b = (int(x) for x in trace.prompt.removeprefix("What is ").rstrip("?").split(" + "))
            assert trace.answer == str(a + b)
            assert (step.type, step.content) == ("calculation", f"Calculating {a} + {b} = {a + b}")
            assert trace.meta["case"] == "math_gen"
        else:
            word, n = trace.prompt.split("'")[1], int(trace.prompt.split()[-2])
            assert trace.answer.split() == [word] * n
            assert (step.type, step.content) == ("reasoning", f"Repeating {word} {n} times")
            assert trace.meta["case"] == "text_gen"
    assert traces[0].prompt == "What is 82 + 15?"  # random.Random(42)
    assert datasets.seed("golden-v2").manifest.stats["distinct_prompts"] == 67
    assert len(generate("golden-v2", count=7)) == 7


def test_column_addition_steps_add_up() -> None:
    """Every step is right, carries in the next, and the columns spell the answer."""
    traces = generate("column-addition-v1")
    assert len({t.prompt for t in traces}) == len(traces) == 20_400
    splits = Counter(t.split for t in traces)
    assert splits == {"train": 20_000, "validation": 200, "test": 200}
    for trace in traces[:2000]:
        a, b = (int(x) for x in trace.prompt.removeprefix("What is ").rstrip("?").split(" + "))
        carry, carries, digits = 0, 0, ""
        for column, step in enumerate(trace.steps):
            left, total = step.content.split("=")
            x, y, c = (int(n) for n in left.split("+"))
            assert (x, y, c) == (a // 10**column % 10, b // 10**column % 10, carry)
            assert int(total) == x + y + c
            carry, digits = int(total) // 10, str(int(total) % 10) + digits
            carries += carry
        assert int((str(carry) if carry else "") + digits) == a + b == int(trace.answer)
        assert trace.meta == {"digits": max(len(str(a)), len(str(b))), "carries": carries}


@pytest.mark.parametrize(("key", "count"), [("golden-v1", 6), ("golden-v2", 0)])
def test_a_count_that_cannot_be_made_is_refused(key: str, count: int) -> None:
    """One line, and nothing in the catalog."""
    with pytest.raises(DatasetError, match="num_traces"):
        datasets.seed(key, num_traces=count)
    with pytest.raises(DatasetError, match="not in"):
        datasets.get(key)


def test_another_count_needs_another_key() -> None:
    """A key names one dataset for good; the error shows both digests."""
    first = datasets.seed("golden-v2").manifest.digest
    with pytest.raises(DatasetError, match=first[:16]):
        datasets.seed("golden-v2", num_traces=50)
    assert datasets.seed("golden-v2", num_traces=50, name="golden-v50").manifest.count == 50


def test_dev_reasoning_works_out_what_it_asks() -> None:
    """Answers and steps are what an independent calculation gives, in every family of numbers."""
    families = set()
    for trace in [*generate("dev-reasoning-v1"), *generate("dev-reasoning-v2")]:
        family = trace.meta["family"]
        families.add(family)
        numbers = [int(n) for n in re.findall(r"\d+", trace.prompt)]
        assert len(trace.steps) >= 2
        if family == "change":
            assert int(trace.answer) == numbers[0] + numbers[1] - numbers[2]
        elif family == "shopping":
            assert (
                int(trace.answer) == numbers[4] - numbers[0] * numbers[1] - numbers[2] * numbers[3]
            )
        elif family == "expression":
            assert int(trace.answer) == (numbers[0] + numbers[1]) * numbers[2] - numbers[3]
        elif family == "sequence":
            assert int(trace.answer) == 3 * numbers[-1] - 3 * numbers[-2] + numbers[-3]
        elif family == "letters":
            word = trace.prompt.split("'")[1]
            vowels = len(re.findall("[aeiou]", word))
            assert trace.answer == f"{word[::-1]}-{vowels}"
        elif family == "weekday":
            days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
            start = next(i for i, day in enumerate(days) if day in trace.prompt)
            assert trace.answer == days[(start + numbers[0]) % 7]
        else:
            pairs = re.findall(r"(\w+) is taller than (\w+)", trace.prompt)
            above, below = {a for a, _ in pairs}, {b for _, b in pairs}
            assert {trace.answer} == (
                above - below if "tallest?" in trace.prompt else below - above
            )
        for a, sign, b, c in re.findall(
            r"\b(\d+) ([-+*]) (\d+) = (-?\d+)", " ".join(s.content for s in trace.steps)
        ):
            left, right = int(a), int(b)
            assert int(c) == {"+": left + right, "-": left - right, "*": left * right}[sign]
    assert len(families) == 7


def test_sequences_grow_evenly() -> None:
    """The check above relies on it: second differences are constant."""
    for trace in generate("dev-reasoning-v2"):
        if trace.meta["family"] == "sequence":
            terms = [int(n) for n in re.findall(r"\d+", trace.prompt)] + [int(trace.answer)]
            gaps = [b - a for a, b in itertools.pairwise(terms)]
            assert len({b - a for a, b in itertools.pairwise(gaps)}) == 1


DAMAGE: dict[str, dict[str, Any]] = {
    "answer": {"answer": " "},
    "category": {"meta": {"difficulty": "easy"}},
    "difficulty": {"meta": {"category": "logic", "difficulty": "awful"}},
    "split": {"split": "train"},
}


@pytest.mark.parametrize("kind", [*DAMAGE, "repeats", "at least one"])
def test_the_evaluation_sets_validator(kind: str) -> None:
    """It takes what is built, and names the item that is not as it must be."""
    seed = seeds.find("eval-v2")
    assert seed is not None
    assert seed.validate is not None
    found = seeds.examples(seed, seed=42, count=100)
    assert {e.meta["difficulty"] for e in found} == {"easy", "medium", "hard"}
    assert len({e.meta["category"] for e in found}) == 5
    if kind == "at least one":
        bad: list[Example] = []
    elif kind == "repeats":
        bad = [*found[:5], found[3]]
    else:
        bad = [*found[:5], msgspec.structs.replace(found[5], **DAMAGE[kind])]
    with pytest.raises(ValueError, match=kind if kind == "at least one" else f"item 5.*{kind}"):
        seed.validate(bad)


def test_evaluation_and_training_seeds_share_nothing() -> None:
    """No prompt, and no prompt by half of its 8-grams."""
    evaluated = datasets.seed("eval-v2").manifest
    for key in ("dev-reasoning-v1", "dev-reasoning-v2"):
        trained = datasets.seed(key).manifest
        assert datasets.check_leakage(trained, "train", evaluated, None).ok


def test_a_family_of_reasoning_gym() -> None:
    """Stored as generated, the same each time; an unknown family is one line."""
    built = datasets.seed("reasoning-gym:chain_sum", num_traces=30)
    assert built.manifest.key == "reasoning-gym-chain_sum-v1"
    assert built.manifest.count == 30
    assert not datasets.seed("reasoning-gym:chain_sum", num_traces=30).created
    with pytest.raises(DatasetError, match="no_such_family"):
        datasets.seed("reasoning-gym:no_such_family")
    with pytest.raises(DatasetError, match="expected reasoning-gym:FAMILY"):
        datasets.seed("reasoning-gym:../../x")


def test_other_packages_bring_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group is a seed; one that cannot be loaded is one line."""
    import importlib.metadata

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        made = importlib.metadata.EntryPoint
        return [
            made("theirs-v1", "tests.their_seed", group),
            made("broken-v1", "tests.no_such_module", group),
        ]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert datasets.seed("theirs-v1").manifest.count == 3
    with pytest.raises(DatasetError, match=r"seed broken-v1 \(tests.no_such_module\)"):
        datasets.seed("broken-v1")
