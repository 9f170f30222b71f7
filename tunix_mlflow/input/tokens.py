"""Tokenized examples: each example is tokenized once, and kept as integers."""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunix_mlflow.data.examples import Example
from tunix_mlflow.text.tokenizer import Ids, Mask, Tokenizer


@dataclass(frozen=True)
class TokenizedExamples:
    """The tokens of n examples, one after the other; example i is `offsets[i]:offsets[i+1]`."""

    ids: Ids  # [tokens]
    trained: Mask  # [tokens]
    offsets: npt.NDArray[np.int64]  # [n + 1]

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, [n]."""
        return np.diff(self.offsets)

    def example(self, index: int) -> tuple[Ids, Mask]:
        """Return the ids and the mask of one example, without a copy."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:stop], self.trained[start:stop]


def encode_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, include_steps: bool
) -> TokenizedExamples:
    """Render and tokenize examples, each of them once.

    Args:
        examples: read one at a time.
        tokenizer: with its chat template.
        include_steps: whether reasoning is rendered.

    Raises:
        DatasetError: if the template refuses an example, or the model lacks a token.
        ModelError: if it is not known what to train on.
    """
    return from_arrays(tokenizer.encode_example(e, include_steps=include_steps) for e in examples)


def from_arrays(encoded: Iterable[tuple[Ids, Mask]]) -> TokenizedExamples:
    """Concatenate the ids and masks of examples."""
    ids, trained, offsets = array.array("i"), bytearray(), array.array("q", [0])
    for example_ids, example_mask in encoded:
        ids.frombytes(np.ascontiguousarray(example_ids, np.int32).tobytes())
        trained += np.ascontiguousarray(example_mask, np.bool_).tobytes()
        offsets.append(len(ids))
    return TokenizedExamples(
        np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32),
        np.frombuffer(trained, np.bool_) if trained else np.zeros(0, np.bool_),
        np.frombuffer(offsets, np.int64),
    )


def longest(*splits: TokenizedExamples) -> int:
    """Return the row length that the longest example of some splits needs.

    A row holds one token fewer than an example: the last one is only a target.
    """
    return max(int(split.lengths.max()) - 1 for split in splits if split.count)


def statistics(tokenized: TokenizedExamples) -> dict[str, float]:
    """Return token counts: mean, percentiles, maximum, sum, and how many are trained on."""
    counts = tokenized.lengths
    percentiles = {f"tokens_p{p}": float(np.percentile(counts, p)) for p in (50, 90, 99)}
    return {
        "tokens_mean": round(float(counts.mean()), 1),
        **percentiles,
        "tokens_max": float(counts.max()),
        "tokens": float(counts.sum()),
        "trained": float(np.count_nonzero(tokenized.trained)),
    }
