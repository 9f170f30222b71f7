"""Manifests: the members of a dataset, their splits, and its digests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from tunix_mlflow.data import canonical
from tunix_mlflow.errors import DatasetError

TRAIN, VALIDATION = "train", "validation"
HELD_OUT: Mapping[str, float] = {VALIDATION: 0.1, "test": 0.1}
"""Shares of the prompts that are held out by default."""
OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "in", "not_in")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_VERSION = re.compile(r"v[0-9]{1,9}")
_SPLIT = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_META_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class Selection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which examples of the catalog a build takes."""

    filters: dict[str, Any] = {}
    """Meta key -> the value it must have, or {operator: value}; all must hold."""
    order: Literal["all", "latest", "random"] = "latest"
    """all: no limit. latest: ingest order, newest first. random: by sha256 of seed and digest."""
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    """For random."""
    limit: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    """Maximum number of examples."""
    splits: dict[str, float] = msgspec.field(default_factory=lambda: dict(HELD_OUT))
    """Split -> share of the prompts, if the data has no splits; train gets the rest. Of data with
    splits but without validation, that share of the train prompts becomes validation."""
    parent: str | None = None
    """Select from this dataset, whose splits are kept; null: from the whole catalog."""


class Split(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and digest of a split."""

    count: int
    digest: str


class Member(NamedTuple):
    """One example of a dataset."""

    digest: str
    split: str


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An immutable record of which members the dataset `key` has."""

    key: str
    digest: str
    count: int
    splits: dict[str, Split]
    request: dict[str, Any]
    """How it was made: the selection, the seed, or the format of the files."""
    stats: dict[str, Any]
    parent: str | None = None
    """The dataset it was selected from: its key and digest."""

    @property
    def name(self) -> str:
        """The key without its version."""
        return parse_key(self.key)[0]

    @property
    def parent_key(self) -> str | None:
        """The key of the dataset it was selected from."""
        return None if self.parent is None else self.parent.rpartition("@")[0]


def parse_key(key: str) -> tuple[str, str]:
    """Split `golden-v2` into (`golden`, `v2`); the version has no dash, so this is unambiguous.

    Raises:
        DatasetError: if it is not name-vN.
    """
    name, _, version = key.rpartition("-")
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise DatasetError(
            f"{key!r} is not a dataset key: expected NAME-vN, NAME of a-z, 0-9, '_', '.', '-'"
        )
    return name, version


def conditions(selection: Selection) -> list[tuple[str, str, Any]]:
    """Return the filters as (key, operator, value).

    Raises:
        DatasetError: if a key is not a plain word, or a value is not a plain value.
    """
    result = []
    for key, condition in selection.filters.items():
        if not _META_KEY.fullmatch(key):
            raise DatasetError(f"filter key {key!r}: use letters, digits, '_' and '-'")
        for operator, value in (
            condition if isinstance(condition, dict) else {"eq": condition}
        ).items():
            if operator not in OPERATORS:
                raise DatasetError(
                    f"filter {key}: no operator {operator!r}; one of {', '.join(OPERATORS)}"
                )
            many = operator in ("in", "not_in")
            if many and not (isinstance(value, list | tuple) and 1 <= len(value) <= 10_000):
                raise DatasetError(f"filter {key}: `{operator}` needs a list of values")
            for one in value if many else [value]:
                _check_value(key, operator, one)
            result.append((key, operator, list(value) if many else value))
    return result


def _check_value(key: str, operator: str, value: Any) -> None:
    if value is None or not isinstance(value, str | int | float | bool):
        raise DatasetError(f"filter {key}: expected text, a number, true or false")
    if operator in ("lt", "le", "gt", "ge") and isinstance(value, bool):
        raise DatasetError(f"filter {key}: true and false have no order")
    try:
        canonical.encode(value)
    except ValueError as error:
        raise DatasetError(f"filter {key}: {error}") from error


def bounds(splits: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return (split, upper bound of the first 16 hex digits of a hash), in order of name.

    A prompt belongs to the first split whose bound is above its hash, else to train.

    Raises:
        DatasetError: for an invalid name or share.
    """
    result, total = [], 0.0
    for name, share in sorted(splits.items()):
        if not _SPLIT.fullmatch(name):
            raise DatasetError(f"split {name!r}: use a-z, 0-9, '_' and '-', starting with a letter")
        if not 0 <= share <= 1:  # a NaN is neither
            raise DatasetError(f"split {name}: expected a share from 0 to 1, got {share}")
        total += share
        if name != TRAIN:
            bound = round((total - splits.get(TRAIN, 0.0) * (name > TRAIN)) * 2**64)
            result.append((name, "g" * 16 if bound >= 2**64 else f"{bound:016x}"))
    if total > 1 + 1e-9 or (TRAIN in splits and total < 1 - 1e-9):
        raise DatasetError(f"the splits' shares add up to {total:g}, not to 1")
    return result


def to_document(manifest: Manifest) -> str:
    """Return the canonical JSON text of a manifest."""
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
    """Return `key: a instead of b` for every request entry that differs."""
    keys = sorted(k for k in {*have, *want} if have.get(k) != want.get(k))
    return "; ".join(f"{k}: {want.get(k)!r} instead of {have.get(k)!r}" for k in keys)
