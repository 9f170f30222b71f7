"""Templates that mean harm: refused in one line, in bounded time and memory."""

from __future__ import annotations

import pytest

from tests.test_fidelity import chat, files, read
from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
    + "{% endfor %}",
    "a range of its own": "{% set r = range(9999) %}"
    + "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "characters of texts": "{% set s = 'x' * 9999 %}"
    + "{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}{% endfor %}{% endfor %}",
    "in a macro": "{% macro m(n) %}{% for a in range(9999) %}{{ m(n - 1) if n }}{% endfor %}"
    + "{% endmacro %}{{ m(9) }}",
    "a range that is too large": "{{ range(10 ** 9) | list }}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a long list": "{{ [1] * 10 ** 10 }}",
    "a large power": "{{ 10 ** 10 ** 10 }}",
    "powers of powers": "{{ (9 ** 64) ** 64 }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "Python's insides": "{{ ''.__class__.__mro__ }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a change of the messages": "{% set _ = messages.append(1) %}",
    "a wrong syntax": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template(name: str) -> None:
    """Nothing runs on, nothing is read, and the line names the model."""
    made = HubTokenizer(files(HOSTILE[name]), "the model")
    with pytest.raises((DatasetError, ModelError), match="the model") as caught:
        made.encode_example(read(chat(("user", "q"), ("assistant", "a"))), DataConfig())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_loops_of_long_conversations_are_no_harm() -> None:
    """Five hundred turns, by a template that looks at all of them for each."""
    template = (
        "{% for m in messages %}{% for n in messages %}{% endfor %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|stop|>\n{% endfor %}"
    )
    turns = [("user", "q"), ("assistant", "a")] * 250
    made = HubTokenizer(files(template), "the model")
    text = made.template.render([{"role": r, "content": c} for r, c in turns])
    assert text.count("<|stop|>") == 500
