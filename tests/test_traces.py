"""MLflow's own traces become a dataset of messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import AssessmentSource

from tests.conftest import run_here
from tests.servers import Server
from tunix_mlflow.data import datasets, snapshot
from tunix_mlflow.data.examples import Example

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"z": 1, "a": 2}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"t": "Oslo"}'}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
# As mlflow.openai writes what the service answered.
COMPLETION = {"id": "x", "object": "chat.completion", "model": "m", "usage": {"total_tokens": 5}}
EMPTY: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None, "function_call": None}


def choice(message: dict[str, Any]) -> dict[str, Any]:
    made = {"role": "assistant", "tool_calls": None, **EMPTY, **message}
    return COMPLETION | {"choices": [{"index": 0, "finish_reason": "stop", "message": made}]}


def chat(messages: list[dict[str, Any]], message: dict[str, Any], **given: Any) -> None:
    with mlflow.start_span("Completions", span_type="CHAT_MODEL") as span:
        span.set_inputs({"model": "m", "messages": messages, **given})
        span.set_outputs(choice(message))


def record() -> dict[str, str]:
    """Make traces of the kinds that people have; their ids by name."""
    ids: dict[str, str] = {}

    def made(name: str) -> None:
        ids[name] = str(mlflow.get_last_active_trace_id())

    chat(ASKED, {"content": "Wet."})
    made("plain")
    with mlflow.start_span("agent", span_type="AGENT") as span:
        span.set_inputs({"question": "Weather?"})
        chat(ASKED, {"content": None, "tool_calls": [CALL]}, tools=[TOOL])
        reply = {"role": "tool", "tool_call_id": "c1", "content": "5"}
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        chat([*ASKED, called, reply], {"content": "5 degrees"}, tools=[TOOL])
        span.set_outputs("5 degrees")
    made("agent")
    with mlflow.start_span("mine") as span:
        span.set_inputs({"question": "2+2?"})
        span.set_outputs("5")
    made("by hand")
    mlflow.flush_trace_async_logging()
    source = AssessmentSource("HUMAN", "me")
    mlflow.log_expectation(
        trace_id=ids["by hand"], name="expected_answer", value="4", source=source
    )
    mlflow.log_feedback(trace_id=ids["by hand"], name="good", value=False, source=source)
    with pytest.raises(ValueError, match="broken"), mlflow.start_span("bad") as span:
        span.set_inputs("q")
        raise ValueError("broken")
    mlflow.flush_trace_async_logging()
    return ids


def by_id(key: str) -> dict[str, Example]:
    return {e.meta["trace_id"]: e for e in snapshot.read(datasets.get(key).digest)}


def test_traces_of_a_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages, calls, tools, expectation and feedback; the same dataset when read again."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    # Both are set by the next call, and put back at the end of the test.
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    mlflow.set_experiment("asked before")
    ids = record()
    uri = "traces:/asked before"
    assert run_here("datasets", "ingest", uri, "--name", "asked", "--version", "v1") == 0
    said = capsys.readouterr()
    assert "3 traces" in said.err
    assert "1 traces are left out: it did not end well" in said.err
    found = by_id("asked-v1")
    assert set(found) == set(ids.values())
    plain, agent, by_hand = (found[ids[name]] for name in ("plain", "agent", "by hand"))
    assert [(m.role, m.content) for m in plain.messages] == [
        *(("system", "Be brief."), ("user", "Weather?"), ("assistant", "Wet."))
    ]
    assert [m.role for m in agent.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(agent.messages[2].tool_calls or "")[0]["function"]["arguments"] == {
        "t": "Oslo"
    }
    assert agent.messages[-1].content == "5 degrees"
    assert json.loads(agent.tools or "") == [TOOL]
    assert [m.content for m in by_hand.messages] == ["2+2?", "4"]
    assert by_hand.meta["feedback"] == {"good": False}
    assert run_here("datasets", "ingest", uri, "--name", "asked", "--version", "v1") == 0
    assert "identical to what is there" in capsys.readouterr().out
    (source,) = datasets.provenance("asked-v1")
    assert source["origin"] == uri
    some = "test=traces:/asked before?filter=trace.name LIKE 'min%'"
    assert run_here("datasets", "ingest", some, "--name", "some", "--version", "v1") == 0
    assert {n: s.count for n, s in datasets.get("some-v1").splits.items()} == {"test": 1}
    # The filter is not decoded: %6d is a wildcard and "6d", not "m".
    none = f"{uri}?filter=trace.name LIKE '%6d%'"
    assert run_here("datasets", "ingest", none, "--name", "none", "--version", "v1") == 2
    assert "has no trace that can be used" in capsys.readouterr().err


def test_traces_that_are_not_there(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and exit code 2."""
    words = ("--name", "a", "--version", "v1")
    for uri, line in {
        "traces:/nowhere": "there is no experiment 'nowhere'",
        "traces:/": "expected traces:/EXPERIMENT",
        "traces:/Default?limit=3": "expected traces:/EXPERIMENT",
        "traces:/Default": "has no trace that can be used",
        "traces:/Default?filter=(": "cannot read the traces",
    }.items():
        assert run_here("datasets", "ingest", uri, *words) == 2
        assert line in capsys.readouterr().err


def test_files_load_no_mlflow(tmp_path: Path) -> None:
    """Reading files is quick."""
    code = (
        "import sys; from tunix_mlflow.cli.dataset_making import _as_files;"
        " _as_files(['a.jsonl'], None); sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
