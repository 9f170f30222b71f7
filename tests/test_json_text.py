"""JSON in a row's own spelling."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_mlflow.data import json_text

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
numbers = st.sampled_from(["0", "-0", "1.0", "1.10", "1e3", "-2.5E-7", "1E+2", "9" * 30, "0.1"])


def spelled(value: object) -> str:
    """Some JSON text of a value, in which a string may stand for the spelling of a number."""
    if isinstance(value, tuple):
        return str(value[0])
    if isinstance(value, list):
        return "[" + " , ".join(map(spelled, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} : {spelled(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


values = st.recursive(
    st.none() | st.booleans() | texts | numbers.map(lambda text: (text,)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)
@given(values)
def test_what_is_read_is_written(value: object) -> None:
    """The same value, keys in the same order, numbers by the same digits, no white space between;
    however strings were escaped; and written text is written as it is."""
    text = spelled(value)
    written = json_text.encode(json_text.parse(text))
    assert json.loads(written, object_pairs_hook=list) == json.loads(text, object_pairs_hook=list)
    strings = re.compile(r'"(?:[^"\\]|\\.)*"')
    digits = re.compile(r"-?\d[\d.eE+-]*")
    assert digits.findall(strings.sub("", written)) == digits.findall(strings.sub("", text))
    assert " " not in strings.sub("", written)
    assert json_text.encode(json_text.parse(written)) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "duplicate key"),
        ("[NaN]", "NaN is not JSON"),
        ("[1e999]", "beyond the range"),
        ('["\\u0000"]', "NUL"),
        ('["\\ud800"]', "lone surrogate"),
        ("[" * 120 + "]" * 120, "nested deeper than 100"),
        ("[1,]", "(?i)value|comma"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    """What the canonical form refuses too, but for large numbers."""
    with pytest.raises(ValueError, match=message):
        json_text.encode(json_text.parse(text))


def test_nulls_of_columns() -> None:
    """They go at every depth; what is false or empty stays."""
    assert json_text.without_nulls({"a": None, "b": [{"c": None, "d": 0}], "e": "", "f": {}}) == {
        "b": [{"d": 0}],
        "e": "",
        "f": {},
    }
