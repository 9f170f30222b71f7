"""A served model gives a row or an error for each row of a request, in every form."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from mlflow.pyfunc import scoring_server

from tests.servers import model_server
from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.models import bundle, decoder, generation
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.tracking.models import flavor

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPE = ModelConfig(width=16, heads=2, kv_heads=2, mlp_width=24, vocab_size=272, max_positions=128)
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
]
CALLED = [
    {"role": "user", "content": "w?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "5"},
]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
NOBODY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG = "x" * 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of 128 positions."""
    params = decoder.init(SHAPE, 272, 3)
    made = bundle.Bundle(SHAPE, decoder.shape(SHAPE, 272)[0], params, ByteTokenizer(), 6)
    folder = tmp_path_factory.mktemp("served")
    bundle.save(made, folder / "bundle")
    frame = pd.DataFrame({"prompt": ["ab"]})
    flavor.save_model(
        str(folder / "model"), folder / "bundle", bundle.weights_digest(params), frame
    )
    return folder / "model"


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    """The same, as MLflow loads it."""
    return mlflow.pyfunc.load_model(str(folder))


def frame(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(columns)


# Each row: whether it is answered.
DIRECT: dict[str, tuple[Any, list[bool]]] = {
    "a text": ("ab", [True]),
    "texts": (["ab", "c"], [True, True]),
    "texts, one too long": (["ab", LONG, "c"], [True, False, True]),
    "a series": (pd.Series(["ab", "c"]), [True, True]),
    "an array": (np.array(["ab", "c"]), [True, True]),
    "an array with one column": (np.array([["ab"], ["c"]]), [True, True]),
    "a frame": (frame(prompt=["ab", "c"]), [True, True]),
    "a frame with a hole": (frame(prompt=["ab", None]), [True, False]),
    "a frame of texts": (frame(text=["ab", "c"]), [True, True]),
    "a frame of something else": (frame(question=["ab", "c"]), [False, False]),
    "a frame of messages": (frame(messages=[CHAT, NOBODY]), [True, False]),
    "prompts and messages": (frame(prompt=["ab", None], messages=[None, CHAT]), [True, True]),
    "tools": (frame(messages=[CALLED, CHAT], tools=[TOOLS, None]), [True, True]),
    "messages and tools as JSON": (
        frame(messages=[json.dumps(CHAT), "no"], tools=[json.dumps(TOOLS), None]),
        [True, False],
    ),
    "a conversation": (CHAT, [True]),
    "conversations": ([CHAT, PARTS, []], [True, True, False]),
    "objects": ([{"prompt": "ab"}, {"messages": CHAT}, {"x": 1}, 5], [True, True, False, False]),
    "an object": ({"prompt": "ab"}, [True]),
    "an object of columns": ({"prompt": ["ab", "c", ""]}, [True, True, False]),
    "an object of columns with tools": (
        {"messages": [CHAT, CALLED], "tools": [None, TOOLS]},
        [True, True],
    ),
    "a prompt and messages": (frame(prompt=["ab"], messages=[CHAT]), [False]),
    "a prompt and a text": ({"prompt": "ab", "text": "c"}, [False]),
    "ShareGPT's keys": ([{"from": "human", "value": "ab"}], [True]),
    "a system text": (frame(prompt=["ab"], system=["be brief"]), [True]),
    "a system that is none": (frame(prompt=["ab"], system=[5]), [False]),
    "no messages": ({"messages": []}, []),
    "no rows": (frame(prompt=[]), []),
}
REQUESTS: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "inputs, texts": ({"inputs": ["ab", LONG]}, [True, False]),
    "inputs, columns": ({"inputs": {"prompt": ["ab", "c"]}}, [True, True]),
    "inputs, objects": ({"inputs": [{"prompt": "ab"}, {"text": "c"}]}, [True, True]),
    "inputs, conversations": ({"inputs": [CHAT, NOBODY]}, [True, False]),
    "instances, texts": ({"instances": ["ab", "c"]}, [True, True]),
    "instances with tools": (
        {"instances": [{"prompt": "ab", "tools": TOOLS}, {"prompt": "c", "tools": TOOLS}]},
        [True, True],
    ),
    "inputs, a conversation of ShareGPT": (
        {"inputs": {"messages": [{"from": "human", "value": "ab"}]}},
        [True],
    ),
    "instances, objects": ({"instances": [{"prompt": "ab"}, {"prompt": "c"}]}, [True, True]),
    "split": (
        {"dataframe_split": {"columns": ["prompt"], "data": [["ab"], [None]]}},
        [True, False],
    ),
    "records": ({"dataframe_records": [{"prompt": "ab"}, {"messages": CHAT}]}, [True, True]),
    "records of texts": ({"dataframe_records": [{"text": "ab"}, {"text": ""}]}, [True, False]),
    "records with tools": (
        {"dataframe_records": [{"messages": CALLED, "tools": TOOLS}, {"messages": PARTS}]},
        [True, True],
    ),
}


def checked(rows: list[dict[str, Any]], answered: list[bool]) -> None:
    """A row has a text and what ended it, or an error; null is null."""
    assert len(rows) == len(answered)
    for row, is_answered in zip(rows, answered, strict=True):
        assert set(row) == {"text", "answer", "finish_reason", "error"}
        assert all(value is None or isinstance(value, str) for value in row.values())
        assert (row["error"] is None) == is_answered, row
        assert (row["finish_reason"] in ("stop", "length")) == is_answered
        assert (row["text"] is not None) == is_answered
        assert row["answer"] is None or row["finish_reason"] == "stop"
        assert not any(marker in (row["text"] or "") for marker in ("<eos>", "<answer>", "<pad>"))


@pytest.mark.parametrize("name", DIRECT)
def test_a_row_for_a_row(served: Any, name: str) -> None:
    """As `mlflow.pyfunc.load_model(...).predict` takes it."""
    data, answered = DIRECT[name]
    checked(served.predict(data).to_dict("records"), answered)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request(served: Any, name: str) -> None:
    """As `mlflow models serve` reads it; NaN has no JSON."""
    body, answered = REQUESTS[name]
    done = scoring_server.invocations(
        json.dumps(body), "application/json", served, served.metadata.get_input_schema()
    )
    assert done.status == 200, done.response
    assert "NaN" not in done.response
    checked(json.loads(done.response)["predictions"], answered)


def test_a_row_is_answered_as_if_it_were_alone(served: Any) -> None:
    """Whatever stands beside it: others of any length, bad ones, other limits."""
    rng = np.random.default_rng(0)
    prompts = ["q" * int(n) for n in rng.integers(1, 60, 100)]
    together = served.predict([*prompts, LONG])
    for number in range(0, 100, 9):
        (alone,) = served.predict([prompts[number]]).to_dict("records")
        assert together.iloc[number].to_dict() == alone


def test_requests_at_once(folder: Path, served: Any, tmp_path: Path) -> None:
    """`mlflow models serve` answers each of 100 requests as if it came alone."""
    rng = np.random.default_rng(1)
    prompts = [chr(97 + n) * length for n, length in enumerate((1, 2, 5, 9, 17, 30, 44, 60))]
    alone = {prompt: served.predict([prompt]).to_dict("records") for prompt in [*prompts, LONG]}
    asked = [list(rng.choice(list(alone), rng.integers(1, 4))) for _ in range(100)]
    with model_server(folder, tmp_path / "server") as port:

        def answers(rows: list[str]) -> list[dict[str, Any]]:
            body = {"dataframe_records": [{"prompt": str(row)} for row in rows]}
            done = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=300)
            assert done.status_code == 200, done.text
            found: list[dict[str, Any]] = done.json()["predictions"]
            return found

        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(answers, asked))
    for rows, answered in zip(asked, found, strict=True):
        assert answered == [alone[row][0] for row in rows]


def test_a_request_that_needs_too_much_memory(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is allocated; and prompts that fit alone are taken in turn."""
    whole = served.predict(["ab", "c", "def"])
    calls = []
    real = generation.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[2]))
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", counted)
    one = generation.cache_bytes(SHAPE, 9, 6, 4)
    # Two prompts are padded to eight rows, whose caches half of what is free has to hold.
    monkeypatch.setattr(bundle, "_free_bytes", lambda _: 2 * 8 * one - 1)
    assert served.predict(["ab", "c", "def"]).equals(whole)
    assert calls == [1, 1, 1]
    monkeypatch.setattr(bundle, "_free_bytes", lambda _: 2 * 8 * one)
    assert served.predict(["ab", "c", "def"]).equals(whole)
    assert calls == [1, 1, 1, 3]
    calls.clear()
    monkeypatch.setattr(bundle, "_free_bytes", lambda _: one)
    assert served.predict(["ab", "c", "def"]).equals(whole)
    assert calls == [1, 1, 1]
    monkeypatch.setattr(bundle, "_free_bytes", lambda _: one - 1)
    (row,) = served.predict(["ab"]).to_dict("records")
    assert "GB are free; lower max_new_tokens" in row["error"]
    assert calls == [1, 1, 1]


def test_a_system_text_is_read(served: Any) -> None:
    """It is the first message, as in training."""
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    asked = served.predict(frame(prompt=["ab"], system=["be brief"]))
    assert asked.equals(served.predict(frame(messages=[turns])))
    assert not asked.equals(served.predict(["ab"]))


def test_a_long_text(served: Any) -> None:
    """The positions of the model limit a request, not what ingest takes."""
    (row,) = served.predict(["x" * 60_000]).to_dict("records")
    assert "60003 tokens, and the model has 128 positions" in row["error"]


def test_the_signature(served: Any) -> None:
    """The signature names what comes back; of inputs MLflow drops what a schema does not name."""
    signature = served.metadata.signature
    assert signature.inputs is None
    assert signature.outputs.input_names() == ["text", "answer", "finish_reason", "error"]
