"""The built-in datasets."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tunix_mlflow.data import datasets, seeds
from tunix_mlflow.data.examples import ReasoningTrace
from tunix_mlflow.errors import DatasetError

DIGESTS = {
    "golden-v1": "ce926aaa12a2719bfd51f296fb4ade79d81b4fc1c8ae9c9d8eb6d660cd850716",
    "golden-v2": "d668d2413868d4f0d6615b2dc2f3d518e2a8aa096307dc7fd821e616c3d12891",
    "column-addition-v1": "68a5376987dfe9233d56e6a5cdb58970aa4089211a699c97366890de4a074972",
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


@pytest.mark.parametrize("key", ["golden-v2", "column-addition-v1"])
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
    assert len({t.prompt for t in traces}) == len(traces) == 20_200
    assert sum(t.split == "test" for t in traces) == 200
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
