"""Rows of tokens: which examples share a row, by best fit, longest first (Johnson 1973)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.input import tokens
from tunix_mlflow.input.tokens import TokenizedExamples
from tunix_mlflow.text.tokenizer import Ids, Mask

_ROUND_TO = 128
LONGEST_FIT = 4096  # the longest row that is chosen automatically


@dataclass(frozen=True)
class TokenRows:
    """A tokenized split and how it is laid out in rows."""

    examples: TokenizedExamples
    rows: list[list[int]]  # indices of examples
    length: int  # T
    truncated: int = 0  # examples cut to fit
    dropped: int = 0  # examples left out since they are too long
    empty: int = 0  # examples left out since no token of them is trained on

    def example(self, index: int) -> tuple[Ids, Mask]:
        """Return the ids and the mask of one example, cut to fit a row."""
        ids, trained = self.examples.example(index)
        return ids[: self.length + 1], trained[: self.length + 1]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        fitting = np.minimum(self.examples.lengths - 1, self.length)
        return int(sum(int(fitting[row].sum()) for row in self.rows))

    @property
    def fill(self) -> float:
        """Share of the row tokens that are not padding, 0..1."""
        return self.tokens / (len(self.rows) * self.length)


def lay_out_rows(tokenized: TokenizedExamples, config: DataConfig, length: int) -> TokenRows:
    """Lay a tokenized split out in rows of `length` tokens.

    Args:
        tokenized: the examples.
        config: whether examples share rows, and what happens to those that are too long.
        length: tokens of a row.

    Raises:
        DatasetError: if an example is too long and `data.overlong` is error, or if no token
            would be trained on.
    """
    fitting = np.minimum(tokenized.lengths - 1, length)
    overlong = int(np.count_nonzero(tokenized.lengths - 1 > length))
    if overlong and config.overlong == "error":
        raise DatasetError(
            f"{overlong} of {tokenized.count} examples are longer than"
            f" data.sequence_length={length}; the longest needs {tokens.longest(tokenized)}."
            " Raise it, or set data.overlong=truncate or drop"
        )
    kept = np.arange(tokenized.count)
    if config.overlong == "drop":
        kept = np.flatnonzero(tokenized.lengths - 1 <= length)
    has_target = _has_target(tokenized, length)[kept]
    empty, kept = len(kept) - int(has_target.sum()), kept[has_target]
    if not len(kept):
        raise DatasetError(
            f"none of the {tokenized.count} examples has a token to train on:"
            " what data.turns and the marks in the rows leave is empty, or was cut off; see"
            " `tunix-mlflow datasets show KEY --mask`"
        )
    if config.packing:
        packed = pack(fitting[kept].tolist(), length)
        indices = kept.tolist()
        rows = [[indices[item] for item in row] for row in packed]
    else:
        rows = [[index] for index in kept.tolist()]
    return TokenRows(
        tokenized,
        rows,
        length,
        truncated=overlong if config.overlong == "truncate" else 0,
        dropped=overlong if config.overlong == "drop" else 0,
        empty=empty,
    )


def _has_target(tokenized: TokenizedExamples, length: int) -> Mask:
    """Return which examples have a token to train on within a row, [n]; the first is no target."""
    before = np.concatenate([[0], np.cumsum(tokenized.trained)])  # trained tokens before each
    starts, stops = tokenized.offsets[:-1] + 1, tokenized.offsets[1:]
    return before[np.minimum(stops, starts + length)] > before[np.minimum(starts, stops)]


def longest_completion(data: TokenRows) -> int:
    """Return a bound for generation: the longest trained completion, plus a quarter."""
    indices = (index for row in data.rows for index in row)
    return max(int(np.count_nonzero(data.example(i)[1])) for i in indices) * 5 // 4 + 1


def fit_length(needed: int) -> int:
    """Return the row length that is chosen when none is configured: `needed` rounded up to 128."""
    return -(-needed // _ROUND_TO) * _ROUND_TO


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of at most `capacity` tokens, each into the fullest row it fits in.

    Args:
        lengths: tokens of each item, 1 to `capacity`.
        capacity: tokens in a row.

    Returns:
        Rows of item indices; a function of the arguments alone.

    Raises:
        ValueError: if an item does not fit into a row.
    """
    rows: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # free tokens -> rows
    free_sizes: list[int] = []  # the sorted keys of by_free
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has {length} tokens; a row holds 1 to {capacity}")
        index = bisect.bisect_left(free_sizes, length)
        if index < len(free_sizes):
            free = free_sizes[index]
            row = by_free[free].pop()
            if not by_free[free]:
                del by_free[free]
                del free_sizes[index]
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = free - length
        if left:
            if left not in by_free:
                by_free[left] = []
                bisect.insort(free_sizes, left)
            by_free[left].append(row)
    return rows
