"""Canonical JSON and digests."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_mlflow.data import canonical

VECTORS = [
    ({"b": 1, "a": [True, False, None]}, b'{"a":[true,false,null],"b":1}'),
    ({"x": 1.0, "y": -0.0, "z": 2.5}, b'{"x":1,"y":0,"z":2.5}'),
    ({"tiny": 1e-7, "big": 1e300}, b'{"big":1e300,"tiny":1e-7}'),
    ({"n": 2**53, "m": -(2**53)}, b'{"m":-9007199254740992,"n":9007199254740992}'),
    ("caf\u00e9 \u4e16 \U0001f600", '"caf\u00e9 \u4e16 \U0001f600"'.encode()),
    ('tab\t quote" back\\ slash/ \u001f', b'"tab\\t quote\\" back\\\\ slash/ \\u001f"'),
    ({"\u00e9": 1, "z": 2, "Z": 3}, '{"Z":3,"z":2,"\u00e9":1}'.encode()),
    (0.1 + 0.2, b"0.30000000000000004"),
    ([], b"[]"),
    ({}, b"{}"),
]


@pytest.mark.parametrize(("value", "expected"), VECTORS)
def test_vectors(value: object, expected: bytes) -> None:
    """The bytes of canonical JSON never change: they are what every digest is made of."""
    assert canonical.encode(value) == expected


def test_digest_vector() -> None:
    """Digest, id and the digest of a set are frozen too."""
    digest = canonical.digest(b'{"a":1}')
    assert digest == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert canonical.id_of(digest) == "015abd7f-5cc5-8a2d-994b-7590f04ad808"
    assert canonical.set_digest("tag", ["b", "a"]) == canonical.set_digest("tag", ["a", "b"])
    assert canonical.set_digest("tag", ["a"]) != canonical.set_digest("other", ["a"])
    assert canonical.set_digest("tag", ["a", "a"]) != canonical.set_digest("tag", ["a"])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2**53 + 1, "\ud800", "a\x00b", {1: 2}, {"k": b""}]
)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    """What JSON systems read differently is refused, with its place named."""
    with pytest.raises(ValueError, match=r"\$"):
        canonical.encode({"k": [value]} if not isinstance(value, dict) else value)


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', "NaN", '{"a":Infinity}', "{", "[1,]", "", "[" * 100_000]
)
def test_lax_json_is_refused(text: str) -> None:
    """Duplicate keys and NaN are not let in, where Python's parser would."""
    with pytest.raises(ValueError, match=r"\w"):
        canonical.decode(text)


numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_round_trip(value: object) -> None:
    """Decoding gives an equal value, and encoding that gives the same bytes."""
    data = canonical.encode(value)
    assert canonical.decode(data) == value
    assert canonical.encode(canonical.decode(data)) == data


@settings(deadline=None)
@given(st.dictionaries(texts, numbers))
def test_order_and_spelling_do_not_matter(value: dict[str, float]) -> None:
    """Key order and white space of the source leave no trace."""
    other = json.loads(json.dumps(dict(reversed(value.items())), indent=2))
    assert canonical.encode(other) == canonical.encode(value)
