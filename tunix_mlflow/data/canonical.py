"""Canonical JSON, version 1, and the digests made from it.

The rules, frozen by test vectors in tests/test_canonical.py:

- UTF-8, object keys sorted by code point, no spaces, strings escaped only where JSON must;
- integers from -2^53 to 2^53; a float with an integral value in that range is written as
  that integer, any other float in its shortest form that reads back the same;
- no NaN, no Infinity, no lone surrogates, no NUL, no duplicate keys, at most 100 levels;
- in `meta`, a null is the same as an absent key.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec

_LIMIT = 2**53
_DEPTH = 100
_NAMESPACE = uuid.UUID("6f1c1a52-6f0f-5c4e-9a34-6a6d6c666c77")


def encode(value: Any) -> bytes:
    """Canonical bytes of a plain JSON value.

    Raises:
        ValueError: naming what cannot be written.
    """
    return msgspec.json.encode(_plain(value, "$"), order="deterministic")


def decode(text: str | bytes) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: for anything that is not JSON, a duplicate key or a NaN among it.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def digest(data: bytes) -> str:
    """sha256, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def id_of(digest_hex: str) -> str:
    """The UUID made from a digest."""
    return str(uuid.uuid5(_NAMESPACE, digest_hex))


def set_digest(tag: str, digests: Iterable[str]) -> str:
    """One digest for a multiset of digests: over a domain tag, the count, and them sorted."""
    members = sorted(digests)
    hasher = hashlib.sha256(f"{tag}\n{len(members)}\n".encode())
    for member in members:
        hasher.update(f"{member}\n".encode())
    return hasher.hexdigest()


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    if depth > _DEPTH:  # Python's own limit differs from version to version
        raise ValueError(f"nested deeper than {_DEPTH} at {path[:80]}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError(f"NUL character at {path}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"lone surrogate at {path}") from error
        return value
    if isinstance(value, int):
        if abs(value) > _LIMIT:
            raise ValueError(f"integer beyond 2^53 at {path}")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} at {path}")
        return int(value) if value.is_integer() and abs(value) <= _LIMIT else value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} at {path} is not text")
            _plain(key, f"{path} (key)")
        return {key: _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    raise ValueError(f"{type(value).__name__} at {path} has no JSON form")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
