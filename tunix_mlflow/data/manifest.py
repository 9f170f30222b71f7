"""Manifests: which examples make a dataset, how they are split, and the digests of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from tunix_mlflow.data import canonical
from tunix_mlflow.errors import DatasetError

TRAIN, TEST = "train", "test"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_VERSION = re.compile(r"v[0-9]{1,9}")
_META_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class Selection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a build asks of the catalog."""

    filters: dict[str, Any] = {}
    """Meta key -> the value it must have."""
    order: Literal["latest", "random"] = "latest"
    """latest: ingest order, newest first. random: by sha256 of seed and digest."""
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    """For random."""
    limit: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    """At most so many examples."""
    test_fraction: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.1
    """Share of prompts that go to the split `test`, unless the data has splits."""


class Split(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One split's size and digest."""

    count: int
    digest: str


class Member(NamedTuple):
    """One example of a dataset."""

    digest: str
    split: str


class Candidate(NamedTuple):
    """An example that a request selected, before it has a split of this dataset."""

    digest: str
    prompt_digest: str
    split: str | None


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An immutable record: the dataset `key` is these members and no others."""

    key: str
    digest: str
    count: int
    splits: dict[str, Split]
    request: dict[str, Any]
    """How it was asked for: the selection, the seed, or the file."""
    stats: dict[str, Any]

    @property
    def name(self) -> str:
        """The key without its version."""
        return parse_key(self.key)[0]


def parse_key(key: str) -> tuple[str, str]:
    """`golden-v2` -> (`golden`, `v2`); the version has no dash, so the key splits one way.

    Raises:
        DatasetError: if it is not name-vN.
    """
    name, _, version = key.rpartition("-")
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise DatasetError(
            f"{key!r} is not a dataset key: expected NAME-vN, NAME of a-z, 0-9, '_', '.', '-'"
        )
    return name, version


def check_selection(selection: Selection) -> None:
    """Raise a DatasetError unless every filter is a plain key and a plain value."""
    for key, value in selection.filters.items():
        if not _META_KEY.fullmatch(key):
            raise DatasetError(f"filter key {key!r}: use letters, digits, '_' and '-'")
        if value is None or not isinstance(value, str | int | float | bool):
            raise DatasetError(f"filter {key}: expected text, a number, true or false")
        try:
            canonical.encode(value)
        except ValueError as error:
            raise DatasetError(f"filter {key}: {error}") from error


def assign_splits(candidates: Sequence[Candidate], test_fraction: float) -> list[Member]:
    """Give every example its split.

    The data's own splits if any example has one: an example without one joins its prompt's,
    else train. Without any, by the hash of the prompt, so that a prompt keeps its split when
    the dataset grows. No prompt ever stands in two splits.

    Raises:
        DatasetError: if the data itself puts a prompt into two splits.
    """
    own: dict[str, str] = {}
    for c in candidates:
        if c.split is not None and own.setdefault(c.prompt_digest, c.split) != c.split:
            raise DatasetError(
                f"the same prompt stands in the splits {own[c.prompt_digest]!r} and {c.split!r}"
                f" (example {canonical.id_of(c.digest)}); leave it in one of them"
            )
    if own:
        return [Member(c.digest, own.get(c.prompt_digest, TRAIN)) for c in candidates]
    bound = int(test_fraction * 2**64)
    return [
        Member(c.digest, TEST if int(c.prompt_digest[:16], 16) < bound else TRAIN)
        for c in candidates
    ]


def dataset_digest(members: Iterable[Member]) -> str:
    """One digest over the members and the splits they are in."""
    return canonical.set_digest("tunix-dataset-v1", (f"{m.digest}:{m.split}" for m in members))


def split_digests(members: Sequence[Member]) -> dict[str, Split]:
    """Count and digest of each split, by name."""
    by_split: dict[str, list[str]] = {}
    for member in members:
        by_split.setdefault(member.split, []).append(member.digest)
    return {
        name: Split(count=len(digests), digest=canonical.set_digest("tunix-split-v1", digests))
        for name, digests in sorted(by_split.items())
    }


def to_document(manifest: Manifest) -> str:
    """Canonical JSON text of the manifest."""
    return canonical.encode(msgspec.to_builtins(manifest)).decode()


def from_document(text: str) -> Manifest:
    """Read :func:`to_document` back.

    Raises:
        DatasetError: if it is not a manifest.
    """
    try:
        return msgspec.json.decode(text, type=Manifest)
    except msgspec.DecodeError as error:
        raise DatasetError(f"a stored manifest cannot be read: {error}") from error


def difference(have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """`key: a instead of b` for every request entry that differs."""
    keys = sorted(k for k in {*have, *want} if have.get(k) != want.get(k))
    return "; ".join(f"{k}: {want.get(k)!r} instead of {have.get(k)!r}" for k in keys)
