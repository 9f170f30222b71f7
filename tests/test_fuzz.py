"""Random rows, templates and configurations: each is taken, or refused in one line.

`make fuzz` tries ten thousand; `make test` a few.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.files import make
from tests.templates.conversations import CONVERSATIONS
from tests.templates.own import OWN
from tests.test_fidelity import files, read
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import DataConfig, LimitsConfig
from tunix_mlflow.data import formats, json_text
from tunix_mlflow.data.examples import canonical_bytes, from_canonical
from tunix_mlflow.errors import ConfigError, DatasetError, ModelError, TunixMlflowError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

COUNT = int(os.environ.get("FUZZ", "60"))
LONGEST_SECONDS = 10  # of this thread's own work: a busy machine is no hang
ODD: list[Any] = [
    *(None, True, 0, -1, 2**70, 1e300, 0.1, float("nan"), float("inf")),
    *("", " ", "\n", "a\u0000b", "\ud800", "\u2028", "x" * 300, "e\u0301", "\x1b[31m", "../../x"),
    *("</think>", "{{ x }}", "<|im_end|>", "####", "\ue0f0", "NaN"),
    *([], {}, [[]], {"": ""}, [None], {"role": "user"}),
]


def seeds() -> list[dict[str, Any]]:
    """Rows of every form, to begin with."""
    found: list[dict[str, Any]] = []
    for file in make.files():
        if file.name.endswith(".jsonl") and file.form is not None and not file.options:
            for line in file.data.decode("utf-8-sig").splitlines():
                found += [json.loads(line)] if line.strip() else []
    return found


def mutated(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value with something else in a place or two."""
    if rng.random() < 0.12 or depth > 6:
        return rng.choice(ODD)
    if isinstance(value, dict):
        items = [(k, mutated(v, rng, depth + 1)) for k, v in value.items() if rng.random() > 0.06]
        if rng.random() < 0.1:
            items.append((rng.choice(["role", "content", "tools", "x", ""]), rng.choice(ODD)))
        return dict(items)
    if isinstance(value, list):
        items_ = [mutated(v, rng, depth + 1) for v in value if rng.random() > 0.06]
        return items_ * 2 if rng.random() < 0.05 else items_
    if isinstance(value, str) and rng.random() < 0.2:
        return value[: rng.randint(0, len(value))] + str(rng.choice(ODD))
    return value


def test_rows() -> None:
    """A row becomes an example that its canonical text gives back, or a ValueError says why not."""
    rng, begin, limits = random.Random(0), seeds(), LimitsConfig()
    taken = 0
    for _ in range(COUNT):
        row = mutated(rng.choice(begin), rng)
        if not isinstance(row, dict):
            continue
        started = time.thread_time()
        try:
            tree = json_text.parse(json.dumps(row))
            form = formats.recognise(tree)
            example = formats.reader(form, limits, {}, None, has_columns=False)(tree)
            text = canonical_bytes(example)
        except (ValueError, DatasetError) as error:
            assert str(error)
        else:
            taken += 1
            assert from_canonical(text) == example or canonical_bytes(from_canonical(text)) == text
        assert time.thread_time() - started < LONGEST_SECONDS
    assert taken > COUNT // 10


def test_templates() -> None:
    """A template that is cut, doubled and mixed renders, or a line says what is wrong with it."""
    rng = random.Random(1)
    sources = [*OWN.values(), "{{ range(99999) | list }}", "{{ 'x' * 99999 }}", "{% raw %}", "{{ '"]
    rows = [{"messages": m, **({"tools": t} if t else {})} for m, t in CONVERSATIONS.values()]
    rendered = 0
    for _ in range(COUNT):
        one, other = rng.choice(sources), rng.choice(sources)
        cut = rng.randint(0, len(one))
        source = (
            one[:cut]
            + rng.choice(["", other, "{% endfor %}", "}}", "{{ m", "\ue0f0"])
            + (one[cut + rng.randint(0, 9) :])
        )
        started = time.thread_time()
        try:
            made = HubTokenizer(files(source), "the model")
            ids, trained, _ = made.encode_example(read(rng.choice(rows)), DataConfig())
        except (DatasetError, ModelError) as error:
            assert "\n" not in str(error)
        else:
            rendered += 1
            assert len(ids) == len(trained)
        assert time.thread_time() - started < LONGEST_SECONDS
    assert rendered > COUNT // 20


def test_configurations(tmp_path: Path) -> None:
    """A file of YAML, whole or damaged, is a configuration, or a line says what is wrong."""
    rng, path = random.Random(2), tmp_path / "config.yaml"
    tree = {
        "training": {"steps": 5, "batch_size": 2, "param_dtype": "float32"},
        "data": {"turns": "all", "sequence_length": 64, "evaluation_sets": ["a-v1"]},
        "model": {"width": 32, "rope_scaling": {"kind": "llama3", "factor": 2}},
        "promotion": {"thresholds": {"exact_match": 0.5}},
    }
    taken = 0
    for _ in range(COUNT):
        text = yaml.safe_dump(tree if rng.random() < 0.2 else _plain(mutated(tree, rng)))
        if rng.random() < 0.4:
            cut = rng.randint(0, len(text))
            text = text[:cut] + rng.choice(
                ["*a", "&a [*a]", "!!python/object:os.x", "\t", "{", "- "]
            )
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        started = time.thread_time()
        try:
            load_config(path)
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            taken += 1
        assert time.thread_time() - started < LONGEST_SECONDS
    assert taken > COUNT // 20


def _plain(value: Any) -> Any:
    """A value that YAML can write."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "ignore").decode().replace("\x00", "").replace("\x1b", "")
    return value


@pytest.mark.parametrize("row", [{"messages": 5}, {"prompt": {}, "completion": "c"}])
def test_what_is_refused_says_where(row: dict[str, Any]) -> None:
    """By a JSON path."""
    with pytest.raises((ValueError, TunixMlflowError), match=r"\$\."):
        formats.reader(formats.recognise(row), LimitsConfig(), {}, None, has_columns=False)(row)
