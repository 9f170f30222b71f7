"""Canonical JSON, version 1, and digests of it.

The rules, frozen by test vectors in tests/test_canonical.py:

- UTF-8, object keys sorted by code point, no spaces, strings escaped only where JSON must;
- integers from -2^53 to 2^53; a float with an integral value in that range is written as
  that integer, any other float in its shortest form that reads back the same;
- no NaN, no Infinity, no lone surrogates, no NUL, no duplicate keys, at most 100 levels;
- in `meta`, a null and an empty object are the same as an absent key, at every depth:
  formats with columns add both.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

_LIMIT = 2**53
_DEPTH = 100
_ENCODER = msgspec.json.Encoder(order="deterministic")


def encode(value: Any) -> bytes:
    """Return the canonical bytes of a plain JSON value.

    Raises:
        ValueError: naming what cannot be written.
    """
    return msgspec.json.encode(_plain(value, "$"), order="deterministic")


def decode(
    text: str | bytes,
    parse_int: Callable[[str], int] = int,
    parse_float: Callable[[str], float] = float,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """Parse strict JSON.

    Args:
        text: of one value.
        parse_int: makes an integer of its digits.
        parse_float: makes any other number of its text.
        parse_constant: makes a value of NaN or an infinity; None: they are an error.

    Raises:
        ValueError: if it is not strict JSON, for example if it has a duplicate key or a NaN.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=parse_constant or _no_constant,
            parse_int=parse_int,
            parse_float=parse_float,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse(data: bytes) -> Any:
    """Parse strict JSON in strict UTF-8, several times as fast as :func:`decode`.

    Raises:
        ValueError: as :func:`decode`.
    """
    try:
        tree = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return decode(data)  # it has better messages
    return tree if lossless(data, tree) else decode(data)


def lossless(data: bytes, tree: Any) -> bool:
    """Return whether `tree` has every key of the JSON text it was parsed from.

    A parser that keeps one of two equal keys loses quotation marks, so they are counted.
    """
    return quotes(data) == quotes(msgspec.json.encode(tree))


def quotes(data: bytes) -> int:
    """Return the number of quotation marks of a JSON text that begin or end a string."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return data.count(b'"')


def clean_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """Return `meta` without nulls and empty objects, its numbers in canonical form.

    Raises:
        ValueError: naming what has no canonical form.
    """
    for value in meta.values():
        kind = type(value)
        if kind is not str and kind is not bool and (kind is not int or abs(value) > _LIMIT):
            cleaned: dict[str, Any] = _without_empty(_plain(meta, "$.meta"))
            return cleaned
    return meta


def encode_struct(value: msgspec.Struct) -> bytes:
    """Return the canonical bytes of a Struct whose numbers are canonical already.

    Raises:
        ValueError: naming what cannot be written.
    """
    try:
        data = _ENCODER.encode(value)
    except (UnicodeEncodeError, RecursionError, msgspec.MsgspecError, OverflowError):
        data = b"\\u0000"
    if b"\\u0000" in data:  # a NUL, or a backslash before "u0000"
        return encode(msgspec.to_builtins(value))
    return data


def digest(data: bytes) -> str:
    """Return the sha256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def id_of(digest_hex: str) -> str:
    """Return the UUID of a digest: its first 16 bytes, marked as version 8 (RFC 9562)."""
    number = int(digest_hex[:32], 16) & ~(0xF << 76) & ~(0x3 << 62)
    return str(uuid.UUID(int=number | 0x8 << 76 | 0x2 << 62))


def set_digest(tag: str, digests: Iterable[str]) -> str:
    """Return the digest of a multiset of digests: of a domain tag, the count, and them sorted."""
    members = sorted(digests)
    hasher = set_hasher(tag, len(members))
    for member in members:
        hasher.update(f"{member}\n".encode())
    return hasher.hexdigest()


def set_hasher(tag: str, count: int) -> hashlib._Hash:
    """Return the hasher of :func:`set_digest`, before the sorted members, which follow as lines."""
    return hashlib.sha256(f"{tag}\n{count}\n".encode())


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
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} at {path}")
        return int(value) if value.is_integer() and abs(value) <= _LIMIT else float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} at {path} is not text")
            _plain(key, f"{path} (key)")
        return {key: _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    raise ValueError(f"{type(value).__name__} at {path} has no JSON form")


def _without_empty(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item != {}}
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
