"""Does an evaluation set stand in what was trained on? By prompt, and by runs of eight words.

A split's 8-grams are kept as a Bloom filter (Bloom 1970): no false "no", and one false "yes" in
some hundred, so that a prompt counts as overlapping only when half of its 8-grams are found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

GRAM = 8  # words
SHARE = 0.5  # of a prompt's 8-grams, from which on it overlaps
_BITS = 12  # of the filter, for each 8-gram
_PROBES = 4
_LARGEST = 2**31  # bits

Grams = npt.NDArray[np.uint64]


class Leakage(NamedTuple):
    """What of an evaluation split was found in a training split."""

    prompts: int  # of the evaluation split
    exact: list[str]  # digests of its examples whose prompt is trained on
    overlapping: list[str]  # digests of those with SHARE of their 8-grams in it, or more
    grams: int  # distinct 8-grams of the evaluation split
    found: int  # of them, in the training split

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.exact and not self.overlapping

    def figures(self) -> dict[str, float]:
        """For a run's metrics."""
        return {
            "leakage_exact": float(len(self.exact)),
            "leakage_overlapping": float(len(self.overlapping)),
            "leakage_grams": self.found / self.grams if self.grams else 0.0,
        }


def grams(texts: pa.Array) -> tuple[Grams, npt.NDArray[np.int64]]:
    """Every 8-gram of some texts as a 64-bit hash, and the index of the text it is from.

    Words are runs of letters and digits, in lower case. A text of fewer than eight words is
    one gram; one without words has none.
    """
    plain = pc.utf8_lower(pc.cast(texts, pa.string()))
    plain = pc.utf8_trim(pc.replace_substring_regex(plain, r"[^\pL\pN]+", " "), " ")
    words = pc.split_pattern(plain, " ")
    if isinstance(words, pa.ChunkedArray):
        words = words.combine_chunks()
    counts = pc.list_value_length(words).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = words.flatten().dictionary_encode()
    table = np.array(
        [
            int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            for word in flat.dictionary.to_pylist()
        ],
        np.uint64,
    )
    hashes = table[flat.indices.to_numpy()] if len(table) else np.zeros(0, np.uint64)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), np.maximum(counts - GRAM + 1, 1))
    first = np.concatenate([[0], np.cumsum(np.maximum(counts - GRAM + 1, 1))])[:-1]
    place = np.arange(len(owner)) - first[owner] + starts[owner]  # a gram's first word
    length = np.minimum(counts[owner], GRAM)
    made = length.astype(np.uint64)
    for i in range(GRAM):
        inside = i < length
        word = np.zeros(len(owner), np.uint64)
        word[inside] = hashes[place[inside] + i]
        made = _mix(made ^ word) + np.uint64(i + 1)
    spoken = np.array([True] * len(table))
    if len(table):
        spoken = np.array([word != "" for word in flat.dictionary.to_pylist()])
        keep = spoken[flat.indices.to_numpy()[np.minimum(place, len(hashes) - 1)]]
        keep &= counts[owner] > 0
        made, owner = made[keep], owner[keep]
    else:
        made, owner = made[:0], owner[:0]
    return _mix(made), owner


class Sketch:
    """The 8-grams of one split."""

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self.bits = bits

    @classmethod
    def of(cls, found: Iterable[Grams]) -> Sketch:
        """A filter of the right size; a power of two of bits."""
        parts = list(found)
        number = sum(len(part) for part in parts)
        size = 1 << max(10, (max(number, 1) * _BITS - 1).bit_length())
        bits = np.zeros(min(size, _LARGEST), np.bool_)
        for part in parts:
            for places in _places(part, len(bits)):
                bits[places] = True
        return cls(np.packbits(bits, bitorder="little"))

    def has(self, found: Grams) -> npt.NDArray[np.bool_]:
        """Which of the 8-grams are in it (or look so)."""
        inside = np.ones(len(found), np.bool_)
        for places in _places(found, len(self.bits) * 8):
            inside &= (self.bits[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)
        return inside


def compare(
    trained_prompts: set[str],
    sketch: Sketch,
    digests: Sequence[str],
    prompts: Sequence[str],
    asked: Sequence[str],
) -> Leakage:
    """Look an evaluation split up in a training split.

    Args:
        trained_prompts: prompt digests of the training split.
        sketch: its 8-grams.
        digests: of the evaluation examples.
        prompts: their prompt digests.
        asked: their prompts' texts.
    """
    hashes, owner = grams(pa.array(asked, pa.string()))
    inside = sketch.has(hashes)
    total = np.bincount(owner, minlength=len(asked))
    hits = np.bincount(owner[inside], minlength=len(asked))
    # Short prompts are one gram: the same words are the same question.
    over = (total > 0) & (hits >= SHARE * total)
    exact = [d for d, p in zip(digests, prompts, strict=True) if p in trained_prompts]
    distinct, index = np.unique(hashes, return_index=True)
    return Leakage(
        len(set(prompts)),
        exact,
        [digests[int(i)] for i in np.flatnonzero(over)],
        len(distinct),
        int(np.count_nonzero(inside[index])),
    )


def _mix(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _places(found: Grams, size: int) -> Iterable[npt.NDArray[np.int64]]:
    step = _mix(found) | np.uint64(1)
    for probe in range(_PROBES):
        yield ((found + np.uint64(probe) * step) & np.uint64(size - 1)).astype(np.int64)
