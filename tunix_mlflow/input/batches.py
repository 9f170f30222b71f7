"""From examples to batches of token rows, each batch a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.input.packing import pack
from tunix_mlflow.text.tokenizer import Tokenizer

_ROUND_TO = 128
LONGEST_FIT = 4096  # row tokens that are chosen without being asked for


class Batch(NamedTuple):
    """B rows of T tokens. All arrays are [B, T]; inside a jitted step they are jax's."""

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]  # the token that follows
    positions: npt.NDArray[np.int32]  # from 0 within each example
    segments: npt.NDArray[np.int32]  # 0 = padding, else the example's number in the row
    loss_mask: npt.NDArray[np.bool_]  # whether the target is trained on


@dataclass(frozen=True)
class TokenRows:
    """A tokenized split and how it is laid into rows."""

    ids: list[npt.NDArray[np.int32]]  # one array an example
    trained: list[npt.NDArray[np.bool_]]
    rows: list[list[int]]  # example numbers
    length: int  # T
    truncated: int = 0  # examples cut to fit
    dropped: int = 0  # examples left out

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(len(self.ids[i]) - 1 for row in self.rows for i in row)

    @property
    def fill(self) -> float:
        """Share of the row tokens that are not padding, 0..1."""
        return self.tokens / (len(self.rows) * self.length)


def lengths(
    examples: Sequence[Example], tokenizer: Tokenizer, include_steps: bool
) -> dict[str, float]:
    """Tokens of examples under a tokenizer: mean, percentiles, the most; and what is trained on."""
    both = [tokenizer.example(e, include_steps=include_steps) for e in examples]
    counts = np.array([len(ids) for ids, _ in both])
    shares = {f"tokens_p{p}": float(np.percentile(counts, p)) for p in (50, 90, 99)}
    return {
        "tokens_mean": round(float(counts.mean()), 1),
        **shares,
        "tokens_max": float(counts.max()),
        "tokens": float(counts.sum()),
        "trained": float(sum(int(mask.sum()) for _, mask in both)),
    }


def longest(examples: Sequence[Example], tokenizer: Tokenizer, include_steps: bool) -> int:
    """Row tokens that the longest example needs."""
    return max(len(tokenizer.example(e, include_steps=include_steps)[0]) - 1 for e in examples)


def longest_completion(data: TokenRows) -> int:
    """A bound for generation: the longest trained completion, plus a quarter."""
    return max(int(np.count_nonzero(mask)) for mask in data.trained) * 5 // 4 + 1


def fit_length(needed: int) -> int:
    """The row length chosen when none is configured: `needed`, rounded up to 128."""
    return -(-needed // _ROUND_TO) * _ROUND_TO


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: DataConfig,
    length: int,
) -> TokenRows:
    """Render, tokenize and lay out one split.

    Raises:
        DatasetError: when an example is too long and `data.overlong` is error, or when no
            token would be trained on.
    """
    ids: list[npt.NDArray[np.int32]] = []
    trained: list[npt.NDArray[np.bool_]] = []
    overlong = 0
    for example in examples:
        tokens, mask = tokenizer.example(example, include_steps=config.include_steps)
        if len(tokens) - 1 > length:
            overlong += 1
            if config.overlong == "drop":
                continue
            tokens, mask = tokens[: length + 1], mask[: length + 1]
        ids.append(tokens)
        trained.append(mask)
    if overlong and config.overlong == "error":
        raise DatasetError(
            f"{overlong} of {len(examples)} examples are longer than"
            f" data.sequence_length={length}; the longest needs"
            f" {longest(examples, tokenizer, config.include_steps)}."
            " Raise it, or set data.overlong=truncate or drop"
        )
    if not any(mask[1:].any() for mask in trained):
        raise DatasetError(
            f"none of the {len(examples)} examples has a token to train on:"
            " every message is marked untrained, or was cut off; see"
            " `tunix-mlflow datasets show KEY --mask`"
        )
    return TokenRows(
        ids,
        trained,
        lay_out(ids, length, packing=config.packing),
        length,
        truncated=overlong if config.overlong == "truncate" else 0,
        dropped=overlong if config.overlong == "drop" else 0,
    )


def lay_out(ids: Sequence[npt.NDArray[np.int32]], length: int, *, packing: bool) -> list[list[int]]:
    """Which examples share a row of `length` tokens, by number; without packing, none."""
    lengths = [len(tokens) - 1 for tokens in ids]
    return pack(lengths, length) if packing else [[number] for number in range(len(ids))]


def blank(rows: int, length: int) -> Batch:
    """A batch of padding."""
    shape = (rows, length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.bool_),
    )


def assemble(data: TokenRows, rows: Sequence[Sequence[int]]) -> Batch:
    """Write rows of example numbers out as arrays."""
    batch = blank(len(rows), data.length)
    for r, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row, start=1):
            ids = data.ids[number]
            stop = start + len(ids) - 1
            batch.tokens[r, start:stop] = ids[:-1]
            batch.targets[r, start:stop] = ids[1:]
            batch.positions[r, start:stop] = np.arange(stop - start)
            batch.segments[r, start:stop] = segment
            batch.loss_mask[r, start:stop] = data.trained[number][1:]
            start = stop
    return batch


class TrainBatches:
    """The endless stream of training batches; `at(step)` needs nothing but the step."""

    def __init__(self, data: TokenRows, *, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def at(self, step: int) -> Batch:
        """The batch of update number `step`, counted from 0.

        Raises:
            DatasetError: if no token of the batch is trained on.
        """
        batch = assemble(self.data, self.rows_at(step))
        if not batch.loss_mask.any():
            raise DatasetError(
                f"the batch of step {step} has no token to train on; raise"
                " training.batch_size, or see `tunix-mlflow datasets show KEY --mask`"
            )
        return batch

    def rows_at(self, step: int) -> list[list[int]]:
        """The rows of that batch, as numbers of examples."""
        count = len(self.data.rows)
        first = step * self.batch_size
        rows = []
        for position in range(first, first + self.batch_size):
            epoch, index = divmod(position, count)
            rows.append(self.data.rows[self._order(epoch)[index]])
        return rows

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            # Raw Philox output is frozen by NumPy's stream policy; permutation() is not.
            bits = np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch])
            keys = bits.random_raw(len(self.data.rows))
            self._epoch = (epoch, np.argsort(keys, kind="stable"))
        return self._epoch[1]


def eval_batches(data: TokenRows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with empty rows."""
    for start in range(0, len(data.rows), batch_size):
        rows = data.rows[start : start + batch_size]
        yield assemble(data, [*rows, *([[]] * (batch_size - len(rows)))])
