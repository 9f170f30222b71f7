"""Find evaluation prompts in a training split: by whole prompt, and by sequences of eight words.

A split's 8-grams are kept as a Bloom filter (Bloom 1970), which finds every 8-gram that it has, and
about one in a hundred that it has not. A prompt overlaps when half of its 8-grams are in the split:
if the filter finds that many, they are looked up among all of the split's 8-grams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

GRAM = 8  # words
THRESHOLD = 0.5  # share of a prompt's 8-grams, from which on it overlaps
_BITS = 12  # of the filter, for each 8-gram
_PROBES = 4
_LARGEST = 2**31  # bits

Grams = npt.NDArray[np.uint64]


class Leakage(NamedTuple):
    """The part of an evaluation split that is in a training split."""

    prompts: int  # of the evaluation split
    exact: list[str]  # digests of the examples whose prompt is in the training split
    overlapping: list[str]  # digests of those with THRESHOLD of their 8-grams in it, or more
    grams: int  # distinct 8-grams of the evaluation split
    found: int  # those of them that are in the training split

    @property
    def ok(self) -> bool:
        """Whether there is no leakage."""
        return not self.exact and not self.overlapping

    def figures(self) -> dict[str, float]:
        """Return the figures for a run's record."""
        return {
            "leakage_exact": float(len(self.exact)),
            "leakage_overlapping": float(len(self.overlapping)),
            "leakage_grams": self.found / self.grams if self.grams else 0.0,
        }


def grams(texts: pa.Array) -> tuple[Grams, npt.NDArray[np.int64]]:
    """Return every 8-gram of some texts as a 64-bit hash, and the index of its text.

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
    index = np.arange(len(owner)) - first[owner] + starts[owner]  # of a gram's first word
    length = np.minimum(counts[owner], GRAM)
    mixed = length.astype(np.uint64)
    for i in range(GRAM):
        inside = i < length
        word = np.zeros(len(owner), np.uint64)
        word[inside] = hashes[index[inside] + i]
        mixed = _mix(mixed ^ word) + np.uint64(i + 1)
    if len(table):
        is_word = np.array([word != "" for word in flat.dictionary.to_pylist()])
        keep = is_word[flat.indices.to_numpy()[np.minimum(index, len(hashes) - 1)]]
        keep &= counts[owner] > 0
        mixed, owner = mixed[keep], owner[keep]
    else:
        mixed, owner = mixed[:0], owner[:0]
    return _mix(mixed), owner


class Sketch:
    """The 8-grams of one split."""

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self.bits = bits

    @classmethod
    def of(cls, grams: Iterable[Grams]) -> Sketch:
        """Return a sketch of a size that fits; its number of bits is a power of two."""
        parts = list(grams)
        count = sum(len(part) for part in parts)
        size = 1 << max(10, (max(count, 1) * _BITS - 1).bit_length())
        bits = np.zeros(min(size, _LARGEST), np.bool_)
        for part in parts:
            for positions in _positions(part, len(bits)):
                bits[positions] = True
        return cls(np.packbits(bits, bitorder="little"))

    def has(self, grams: Grams) -> npt.NDArray[np.bool_]:
        """Return for each 8-gram whether it is in the split, or seems to be."""
        inside = np.ones(len(grams), np.bool_)
        for positions in _positions(grams, len(self.bits) * 8):
            inside &= (self.bits[positions >> 3] >> (positions & 7).astype(np.uint8) & 1).astype(
                bool
            )
        return inside


def compare(
    trained_prompts: set[str],
    sketch: Sketch,
    digests: Sequence[str],
    prompt_digests: Sequence[str],
    prompt_texts: Sequence[str],
    confirm: Callable[[Grams], npt.NDArray[np.bool_]],
) -> Leakage:
    """Look for the prompts of an evaluation split in a training split.

    Args:
        trained_prompts: prompt digests of the training split.
        sketch: its 8-grams.
        digests: of the evaluation examples.
        prompt_digests: theirs.
        prompt_texts: theirs.
        confirm: returns which of some 8-grams are in the training split, exactly; called if the
            sketch finds an overlapping prompt.
    """
    hashes, owner = grams(pa.array(prompt_texts, pa.string()))
    inside = sketch.has(hashes)
    overlaps = _overlapping(owner, inside, len(prompt_texts))
    if overlaps.any():
        candidates = np.flatnonzero(inside)
        inside[candidates] = confirm(hashes[candidates])
        overlaps = _overlapping(owner, inside, len(prompt_texts))
    exact = [d for d, p in zip(digests, prompt_digests, strict=True) if p in trained_prompts]
    distinct, index = np.unique(hashes, return_index=True)
    return Leakage(
        len(set(prompt_digests)),
        exact,
        [digests[int(i)] for i in np.flatnonzero(overlaps)],
        len(distinct),
        int(np.count_nonzero(inside[index])),
    )


def _overlapping(
    owner: npt.NDArray[np.int64], inside: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """Return which of `count` prompts overlap. Short ones are one 8-gram: their words count."""
    total = np.bincount(owner, minlength=count)
    hits = np.bincount(owner[inside], minlength=count)
    return (total > 0) & (hits >= THRESHOLD * total)


def _mix(x: Any) -> Any:
    """Return the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _positions(grams: Grams, size: int) -> Iterable[npt.NDArray[np.int64]]:
    step = _mix(grams) | np.uint64(1)
    for probe in range(_PROBES):
        yield ((grams + np.uint64(probe) * step) & np.uint64(size - 1)).astype(np.int64)
