"""Batches of token rows, each a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tunix_mlflow.input.packing import TokenRows


class Batch(NamedTuple):
    """B rows of T tokens. All arrays are [B, T]; inside a jitted step they are jax's.

    ``targets`` is ``tokens`` shifted by one:

        tokens   <bos> <user> 2 + 2 ? <assistant> 4
        targets  <user> 2 + 2 ? <assistant> 4 <eos>
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]  # the token that follows
    positions: npt.NDArray[np.int32]  # from 0 within each example
    segments: npt.NDArray[np.int32]  # 0 = padding, else the example's number in the row
    loss_mask: npt.NDArray[np.bool_]  # whether the target is trained on


def blank(rows: int, length: int) -> Batch:
    """Return a batch of padding."""
    shape = (rows, length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.bool_),
    )


def assemble(data: TokenRows, rows: Sequence[Sequence[int]]) -> Batch:
    """Write rows of example indices out as arrays."""
    batch = blank(len(rows), data.length)
    for r, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            ids, trained = data.example(index)
            stop = start + len(ids) - 1
            batch.tokens[r, start:stop] = ids[:-1]
            batch.targets[r, start:stop] = ids[1:]
            batch.positions[r, start:stop] = np.arange(stop - start)
            batch.segments[r, start:stop] = segment
            batch.loss_mask[r, start:stop] = trained[1:]
            start = stop
    return batch


class TrainBatches:
    """The endless stream of training batches; `at(step)` depends on nothing but the step.

    Every epoch has every row once, in an order of its own.
    """

    def __init__(self, data: TokenRows, *, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def at(self, step: int) -> Batch:
        """Return the batch of update number `step`, counted from 0."""
        return assemble(self.data, self.rows_at(step))

    def rows_at(self, step: int) -> list[list[int]]:
        """Return the rows of that batch, as indices of examples."""
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
    """Yield every row once, in order; the last batch is filled up with empty rows."""
    for start in range(0, len(data.rows), batch_size):
        rows = data.rows[start : start + batch_size]
        yield assemble(data, [*rows, *([[]] * (batch_size - len(rows)))])
