"""Tokenized examples: each example is tokenized once, and kept as integers."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, example_id, select_turns
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text import fidelity
from tunix_mlflow.text.fidelity import Finding
from tunix_mlflow.text.tokenizer import Ids, Mask, Tokenizer


class Loss(NamedTuple):
    """A kind of finding, and how many examples it is in; see text.fidelity."""

    kind: str
    refuses: bool  # whether a model should not be trained on them without having been asked
    examples: int
    first: Finding
    first_example: int  # its index


@dataclass(frozen=True)
class TokenizedExamples:
    """The tokens of n examples, one after the other; example i is `offsets[i]:offsets[i+1]`."""

    ids: Ids  # [tokens]
    trained: Mask  # [tokens]
    offsets: npt.NDArray[np.int64]  # [n + 1]
    losses: tuple[Loss, ...] = ()  # what the tokens lack of what the examples say

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
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    config: DataConfig,
    refused: list[str] | None = None,
) -> TokenizedExamples:
    """Render and tokenize examples, each of them once.

    Args:
        examples: read one at a time.
        tokenizer: with its chat template.
        config: which turns are trained on, and how they are rendered.
        refused: is given a line on each example that cannot be encoded, which is left out; None:
            one is an error.

    Raises:
        DatasetError: naming an example that the template refuses, or whose tokens the model lacks.
        ModelError: naming one of which it is not known what to train on.
    """
    losses: dict[tuple[str, bool], Loss] = {}

    def encoded() -> Iterator[tuple[Ids, Mask]]:
        for index, example in enumerate(examples):
            met: set[tuple[str, bool]] = set()
            try:
                parts = [
                    tokenizer.encode_example(part, config)
                    for part in select_turns(example, config.turns)
                ]
            except (DatasetError, ModelError) as error:
                line = f"example {example_id(example)} ({example.prompt[:40]!r}): {error}"
                if refused is None:
                    raise type(error)(line) from error
                refused.append(line)
                continue
            for ids, trained, findings in parts:
                yield ids, trained
                for finding in findings:
                    key = finding.kind, finding.refuses
                    if key not in met:
                        met.add(key)
                        known = losses.get(key, Loss(*key, 0, finding, index))
                        losses[key] = known._replace(examples=known.examples + 1)

    tokenized = from_arrays(encoded())
    ordered = sorted(losses.values(), key=lambda loss: not loss.refuses)
    return dataclasses.replace(tokenized, losses=tuple(ordered))


def describe_loss(loss: Loss, count: int, example: str, split: str | None = None) -> str:
    """Return a line on what examples lack.

    Args:
        loss: what they lack.
        count: the examples in all.
        example: the name of the first of them.
        split: that they are in.
    """
    finding = loss.first
    where = f"message {finding.turn} of example {example}" if finding.turn else f"example {example}"
    quoted = f": {finding.text!r}" if finding.text else ""
    share = f"{loss.examples:,} of {count:,} examples" + (f" of {split}" if split else "")
    return f"{fidelity.KINDS[loss.kind]} in {share}, first in {where}{quoted}"


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
