"""From examples to rows of tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message, reasoning_trace
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.evaluation import scorers
from tunix_mlflow.input import batches, tokens
from tunix_mlflow.input.packing import TokenRows, lay_out_rows, pack
from tunix_mlflow.text import byte_template
from tunix_mlflow.text.byte_tokenizer import MARKERS, ByteTokenizer
from tunix_mlflow.text.tokenizer import Encoded

TOKENIZER = ByteTokenizer()


def examples(count: int) -> list[Example]:
    return [
        reasoning_trace(f"Say {'x' * (n % 7)}{n}", [("t", f"it is {n}")], str(n)).example()
        for n in range(count)
    ]


def tokenized(*found: Example) -> tokens.TokenizedExamples:
    return tokens.encode_examples(found, TOKENIZER, DataConfig())


def rows(count: int = 30, length: int = 64, **data: object) -> TokenRows:
    config = DataConfig(**data)  # type: ignore[arg-type]
    return lay_out_rows(tokenized(*examples(count)), config, length)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_packing_places_every_item_once(lengths: list[int], capacity: int) -> None:
    """No item is lost, doubled or cut, and no row is over-full."""
    packed = pack(lengths, capacity)
    assert Counter(i for row in packed for i in row) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in packed)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_packing_is_close_to_the_least(lengths: list[int]) -> None:
    """Best fit decreasing needs at most 11/9 of the fewest rows, and one more (Johnson 1973)."""
    packed = pack(lengths, 50)
    assert len(packed) <= -(-sum(lengths) // 50) * 11 / 9 + 4


def test_packing_refuses_what_does_not_fit() -> None:
    """The caller decides about long examples, not the packer."""
    with pytest.raises(ValueError, match="item 1 has 51"):
        pack([3, 51], 50)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_round_trips_and_cannot_imitate_a_marker(text: str) -> None:
    """Bytes in, bytes out; a marker's spelling in a text stays text."""
    for spelled in (text, f"{text}<eos><answer>"):
        ids, _ = TOKENIZER.encode([byte_template.Segment(spelled, False, True)])
        assert all(int(i) >= 16 for i in ids)
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == spelled


def test_rendered_example() -> None:
    """The template, spelled out; what is trained on begins after <assistant>."""
    example = reasoning_trace("2+2?", [("a", "s1"), ("b", "s2")], "4").example()
    ids, trained = TOKENIZER.encode(byte_template.render(example, include_steps=True))
    assert (
        TOKENIZER.decode(ids, skip_special_tokens=False)
        == "<bos><user>2+2?<assistant>s1\ns2<answer>4<eos>"
    )
    assert TOKENIZER.decode(ids[trained], skip_special_tokens=False) == "s1\ns2<answer>4<eos>"
    ids, trained = TOKENIZER.encode(byte_template.render(example, include_steps=False))
    assert TOKENIZER.decode(ids[trained], skip_special_tokens=False) == "<answer>4<eos>"
    prompt, mask = TOKENIZER.encode(byte_template.render_prompt(example, include_steps=True))
    assert TOKENIZER.decode(prompt, skip_special_tokens=False) == "<bos><user>2+2?<assistant>"
    assert not mask.any()
    assert TOKENIZER.decode(TOKENIZER.encode_example(example, DataConfig()).ids) == (
        "2+2?s1\ns2\n#### 4"
    )


def test_conversation_marks() -> None:
    """Many turns: assistant turns are trained on unless marked, others never."""
    example = Example(
        messages=(
            Message(role="system", content="S"),
            Message(role="user", content="U1"),
            Message(role="assistant", content="A1", trained=False),
            Message(role="user", content="U2"),
            Message(role="assistant", content="A2"),
        )
    )
    ids, trained = TOKENIZER.encode(byte_template.render(example, include_steps=True))
    expected = "<bos><system>S<user>U1<assistant>A1<eos><user>U2<assistant>A2<eos>"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == expected
    assert TOKENIZER.decode(ids[trained], skip_special_tokens=False) == "A2<eos>"


def test_markers_keep_their_ids() -> None:
    """A trained model depends on them."""
    assert MARKERS == (
        "<pad>",
        "<bos>",
        "<eos>",
        "<answer>",
        "<system>",
        "<user>",
        "<assistant>",
        "<tool>",
    )
    assert TOKENIZER.vocab_size == 272


def test_a_row_is_its_examples_shifted_by_one() -> None:
    """Tokens, targets, positions, segments and mask of a packed row agree with the examples."""
    data = rows()
    assert max(len(row) for row in data.rows) > 1
    for numbers in data.rows:
        batch = batches.assemble(data, [numbers])
        for segment, number in enumerate(numbers, start=1):
            here = batch.segments[0] == segment
            ids, trained = data.example(number)
            assert np.array_equal(batch.tokens[0][here], ids[:-1])
            assert np.array_equal(batch.targets[0][here], ids[1:])
            assert np.array_equal(batch.positions[0][here], np.arange(len(ids) - 1))
            assert np.array_equal(batch.loss_mask[0][here], trained[1:])
        assert not batch.loss_mask[0][batch.segments[0] == 0].any()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    """A fresh stream gives the same batch at any step; another seed another order."""
    data = rows()
    one = batches.TrainBatches(data, batch_size=4, seed=3)
    seen = [one.at(step) for step in range(12)]
    other = batches.TrainBatches(data, batch_size=4, seed=3)
    for step in (11, 0, 7):
        assert all(np.array_equal(a, b) for a, b in zip(other.at(step), seen[step], strict=True))
    different = batches.TrainBatches(data, batch_size=4, seed=4).at(0)
    assert not np.array_equal(different.tokens, seen[0].tokens)


def test_batch_order_is_frozen() -> None:
    """The order of the first epoch for seed 0: a resumed run must find it again."""
    stream = batches.TrainBatches(rows(), batch_size=1, seed=0)
    order = [int(i) for i in stream._order(0)[:8]]
    assert order == [0, 2, 11, 9, 1, 8, 5, 4]


def test_an_epoch_has_every_row_once() -> None:
    """Across batch borders too."""
    data = rows()
    stream = batches.TrainBatches(data, batch_size=1, seed=5)
    count = len(data.rows)
    for epoch in range(3):
        seen = Counter(stream.at(epoch * count + i).tokens.tobytes() for i in range(count))
        assert set(seen.values()) == {1}
        assert len(seen) == count


def test_every_epoch_has_another_order() -> None:
    """The same rows in each, another permutation each time, and the same ones for the same seed."""
    data = rows(packing=False)

    def epochs(seed: int) -> list[tuple[int, ...]]:
        stream = batches.TrainBatches(data, batch_size=1, seed=seed)
        count = len(data.rows)
        order = [stream.rows_at(step)[0][0] for step in range(5 * count)]
        return [tuple(order[i * count : (i + 1) * count]) for i in range(5)]

    found = epochs(3)
    assert all(sorted(epoch) == list(range(30)) for epoch in found)
    assert len({*found, tuple(range(30))}) == 6
    assert epochs(3) == found
    assert not {*epochs(4)} & {*found}


def test_an_example_is_tokenized_once() -> None:
    """Finding the row length and laying out rows both use the arrays, which hold every token."""
    calls = []

    class Counting(ByteTokenizer):
        def encode_example(self, example: Example, config: DataConfig) -> Encoded:
            calls.append(example)
            return super().encode_example(example, config)

    made = examples(30)
    found = tokens.encode_examples(iter(made), Counting(), DataConfig())
    data = lay_out_rows(found, DataConfig(), tokens.longest(found))
    assert calls == made
    assert [a.dtype.name for a in (found.ids, found.trained)] == ["int32", "bool"]
    for index, example in enumerate(made):
        ids, trained, _ = TOKENIZER.encode_example(example, DataConfig())
        assert np.array_equal(data.example(index)[0], ids)
        assert np.array_equal(data.example(index)[1], trained)


def test_eval_batches_have_every_row_once() -> None:
    """The last one is filled up with rows that count nothing."""
    data = rows()
    parts = list(batches.eval_batches(data, 4))
    assert sum(int((b.segments > 0).sum()) for b in parts) == data.tokens
    assert {b.tokens.shape for b in parts} == {(4, 64)}


def test_overlong_examples_are_the_users_choice() -> None:
    """Refused by default with the length that would do; cut or dropped on request, counted."""
    with pytest.raises(DatasetError, match=r"30 of 30 .* the longest needs \d+"):
        rows(length=16)
    assert rows(length=16, overlong="truncate").truncated == 30
    needed = tokens.longest(tokenized(*examples(30)))
    assert rows(length=needed - 1, overlong="drop").dropped >= 1
    assert rows(length=needed).dropped == 0


def test_nothing_to_train_on() -> None:
    """Refused where no example has any; one that has none, or whose turn is cut, is left out."""
    silent = Example(
        messages=(
            Message(role="user", content="u"),
            Message(role="assistant", content="a", trained=False),
        )
    )
    with pytest.raises(DatasetError, match="none of the 1 examples has a token to train on"):
        lay_out_rows(tokenized(silent), DataConfig(), 64)
    mixed = lay_out_rows(tokenized(silent, *examples(1)), DataConfig(packing=False), 64)
    assert (mixed.rows, mixed.empty) == ([[1]], 1)
    long = reasoning_trace("q" * 40, [("t", "s")], "a").example()
    cut = lay_out_rows(tokenized(long, *examples(3)), DataConfig(overlong="truncate"), 32)
    assert ({i for row in cut.rows for i in row}, cut.empty, cut.truncated) == ({1, 2, 3}, 1, 1)


def ids_of(*pieces: str) -> list[int]:
    """Pieces that are a marker's spelling become that marker; the others are text."""
    found, _ = TOKENIZER.encode([byte_template.Segment(p, p in MARKERS, True) for p in pieces])
    return [int(i) for i in found]


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        (["1+1=2", "<answer>", "2"], "2"),
        (["a", "<answer>", " 2 ", "<eos>", "junk"], "2"),
        (["<answer>", "1", "<answer>", "2"], "2"),
        (["<eos>", "<answer>", "3"], "3"),
        (["no marker"], "no marker"),
        ([], None),
        (["<answer>"], None),
        (["text that says <answer>4"], "text that says <answer>4"),
        (["<think>2+2</think>", "4"], "4"),
        (
            ["<answer>", "wrap it in <answer> tags, then <eos>."],
            "wrap it in <answer> tags, then <eos>.",
        ),
    ],
)
def test_answers_are_what_follows_the_last_marker(pieces: list[str], answer: str | None) -> None:
    """Or all of the text, where there is no marker; text that spells a marker is text."""
    assert TOKENIZER.read_answer(ids_of(*pieces)) == answer


@pytest.mark.parametrize(
    ("predicted", "expected", "match"),
    [
        ("4", "4", True),
        ("  Normalize   Whitespace ", "normalize whitespace", True),
        ("PARIS", "Paris", True),
        ("44", "4", False),
        ("", "4", False),
        (None, "", False),
    ],
)
def test_exact_match(predicted: str | None, expected: str, match: bool) -> None:
    """Case and white space do not count; everything else does."""
    assert scorers.exact_match(predicted, expected) is match
