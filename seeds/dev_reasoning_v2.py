"""dev-reasoning-v2: five families of small problems, each worked out in two to six steps.

    "Work out (7 + 5) * 3 - 8." -> 7 + 5 = 12; 12 * 3 = 36; 36 - 8 = 28 -> 28

Families: expression, weekday, ordering, letters, sequence. meta has family and difficulty (1..3).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from tunix_mlflow.data.examples import ReasoningTrace, reasoning_trace

DEFAULT_TRACES = 550
MAX_TRACES = 6_600  # _sequence has 30 * 11 * 4 = 1,320 prompts, a fifth of it
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NAMES = ("Ada", "Bo", "Cy", "Dot", "Eli", "Fay", "Gus", "Hal")
_SYLLABLES = ("ba", "co", "di", "fu", "ge", "ki", "lo", "ma", "ne", "pi", "ru", "sa", "to", "vu")


def generate(*, seed: int = 42, num_traces: int = DEFAULT_TRACES) -> Iterator[ReasoningTrace]:
    """Yield distinct problems, the five families in turn."""
    if not 1 <= num_traces <= MAX_TRACES:
        raise ValueError(f"num_traces must be from 1 to {MAX_TRACES:,}")
    families = (_expression, _weekday, _ordering, _letters, _sequence)
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < num_traces:
        trace = families[len(seen) % len(families)](rng)
        if trace.prompt not in seen:
            seen.add(trace.prompt)
            yield trace


def _trace(
    family: str, difficulty: int, prompt: str, steps: list[str], answer: str
) -> ReasoningTrace:
    kinds = [("reasoning", step) for step in steps]
    return reasoning_trace(prompt, kinds, answer, meta={"family": family, "difficulty": difficulty})


def _expression(rng: random.Random) -> ReasoningTrace:
    a, b, c, d = (rng.randint(2, 40) for _ in range(4))
    total = (a + b) * c
    steps = [f"{a} + {b} = {a + b}", f"{a + b} * {c} = {total}", f"{total} - {d} = {total - d}"]
    prompt = f"Work out ({a} + {b}) * {c} - {d}."
    return _trace("expression", 1 + (total > 500), prompt, steps, str(total - d))


def _weekday(rng: random.Random) -> ReasoningTrace:
    start, ahead = rng.randrange(7), rng.randint(8, 400)
    weeks, rest = divmod(ahead, 7)
    steps = [
        f"{ahead} days are {weeks} weeks and {rest} days",
        f"whole weeks change nothing, so go {rest} days on from {_DAYS[start]}",
    ]
    for day in range(1, rest + 1):
        if day == rest or day == 1:
            steps.append(f"{day} on is {_DAYS[(start + day) % 7]}")
    prompt = f"Today is {_DAYS[start]}. Which weekday is it in {ahead} days?"
    return _trace("weekday", 1 + (ahead > 100), prompt, steps, _DAYS[(start + ahead) % 7])


def _ordering(rng: random.Random) -> ReasoningTrace:
    order = rng.sample(_NAMES, rng.randint(3, 5))  # tallest first
    facts = [f"{a} is taller than {b}" for a, b in itertools.pairwise(order)]
    steps = [f"{fact}: {' > '.join(order[: i + 2])}" for i, fact in enumerate(facts)]
    rng.shuffle(facts)
    place = rng.choice(("tallest", "shortest"))
    answer = order[0] if place == "tallest" else order[-1]
    steps.append(f"the {place} is {answer}")
    prompt = f"{'. '.join(facts)}. Who is the {place}?"
    return _trace("ordering", len(order) - 2, prompt, steps, answer)


def _letters(rng: random.Random) -> ReasoningTrace:
    word = "".join(rng.sample(_SYLLABLES, rng.randint(2, 4)))
    turned = word[::-1]
    vowels = sum(letter in "aeiou" for letter in word)
    steps = [f"spell it: {' '.join(word)}", f"backwards: {' '.join(turned)}"]
    steps += [f"joined: {turned}", f"it has {vowels} vowels"]
    prompt = f"Write '{word}' backwards, then a dash and the number of its vowels."
    return _trace("letters", len(word) // 2 - 1, prompt, steps, f"{turned}-{vowels}")


def _sequence(rng: random.Random) -> ReasoningTrace:
    first, step, growth = rng.randint(1, 30), rng.randint(2, 12), rng.randint(0, 3)
    terms = [first]
    for i in range(4):
        terms.append(terms[-1] + step + i * growth)
    gaps = [b - a for a, b in itertools.pairwise(terms)]
    after = gaps[-1] + growth
    steps = [
        f"the gaps are {', '.join(map(str, gaps))}",
        f"they grow by {growth}, so the next is {after}" if growth else f"all are {step}",
        f"{terms[-1]} + {after} = {terms[-1] + after}",
    ]
    prompt = f"What comes next: {', '.join(map(str, terms))}?"
    return _trace("sequence", 1 + bool(growth), prompt, steps, str(terms[-1] + after))
