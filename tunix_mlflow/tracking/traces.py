"""MLflow's own traces as rows of messages: what people have in MLflow becomes a dataset.

    traces:/EXPERIMENT                          its name or its id
    traces:/EXPERIMENT?filter=FILTER            in MLflow's filter language for traces

The conversation is that of the trace's last chat model, which has seen all of it, or else what the
root span was given and returned. An expectation takes the place of the last answer; feedback, other
expectations and the trace's id become meta.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from mlflow.entities import TraceState
from mlflow.exceptions import MlflowException
from mlflow.tracing.constant import SpanAttributeKey

from tunix_mlflow.errors import ConfigError, TrackingError
from tunix_mlflow.tracking import store

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace
    from mlflow.tracking import MlflowClient

SCHEME = "traces:/"
_FILTER = "filter="
_PAGE = 100
_KNOWN = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning")
_CHAT_MODELS = ("CHAT_MODEL", "LLM")
_EXPECTED = ("expected_response", "expected_answer", "expected_output")


class TraceRows(NamedTuple):
    """The traces of an experiment, as rows of the form `messages`."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]  # why -> how many


def read(client: MlflowClient, uri: str) -> TraceRows:
    """Return the traces that a URI names, in order of time.

    Raises:
        ConfigError: if the URI is none.
        TrackingError: if there is no such experiment, or the filter is wrong.
        UnavailableError: if MLflow does not answer.
    """
    experiment, condition = _parsed(uri)
    rows, left_out = [], dict[str, int]()
    for trace in _search(client, experiment, condition):
        try:
            rows.append(to_row(trace))
        except ValueError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
    return TraceRows(rows, left_out)


def to_row(trace: Trace) -> dict[str, Any]:
    """Return the row of a trace.

    Raises:
        ValueError: if it is not finished, or has no request or response.
    """
    if trace.info.state != TraceState.OK:
        raise ValueError("it did not end well")
    span = _conversation_span(list(trace.data.spans))
    messages = [*_asked(span.inputs), _said(span.outputs)]
    meta: dict[str, Any] = {"trace_id": trace.info.trace_id}
    expectations, feedback = _assessments(trace)
    expected = _expected(expectations)
    if expected is not None:
        name, text = expected
        messages[-1] = {"role": "assistant", "content": text}
        expectations = {k: v for k, v in expectations.items() if k != name}
    meta |= {"expectations": expectations} if expectations else {}
    meta |= {"feedback": feedback} if feedback else {}
    row: dict[str, Any] = {"messages": messages, "meta": meta}
    tools = span.get_attribute(SpanAttributeKey.CHAT_TOOLS) or _key(span.inputs, "tools")
    return row | ({"tools": tools} if tools else {})


def _parsed(uri: str) -> tuple[str, str | None]:
    named, query, condition = uri.removeprefix(SCHEME).partition("?")
    if not named or (query and not condition.startswith(_FILTER)):
        raise ConfigError(f"{uri}: expected {SCHEME}EXPERIMENT or {SCHEME}EXPERIMENT?filter=FILTER")
    # The filter is taken as it is written: it may have + and %.
    return unquote(named), condition.removeprefix(_FILTER) if query else None


def _search(client: MlflowClient, experiment: str, condition: str | None) -> Iterator[Trace]:
    what = f"cannot read the traces of {experiment!r}"
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None and experiment.isdigit():
            found = client.get_experiment(experiment)
        if found is None:
            raise TrackingError(f"there is no experiment {experiment!r}")
        token = None
        while True:
            page = client.search_traces(
                locations=[found.experiment_id],
                filter_string=condition,
                max_results=_PAGE,
                order_by=["timestamp_ms ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return
    except MlflowException as error:
        raise store.failure(error, what, what) from error


def _conversation_span(spans: list[Span]) -> Span:
    if not spans:
        raise ValueError("it has no spans")
    chats = [s for s in spans if s.span_type in _CHAT_MODELS and _key(s.inputs, "messages")]
    if chats:
        return max(chats, key=lambda span: span.start_time_ns)
    return next((span for span in spans if span.parent_id is None), spans[0])


def _asked(given: Any) -> list[dict[str, Any]]:
    """Return the messages of a request."""
    listed = _key(given, "messages")
    if not isinstance(listed, list) or not listed:
        listed = _key(given, "input")
    if isinstance(listed, list) and listed and all(_key(item, "role") for item in listed):
        return [_message(item) for item in listed]
    return [{"role": "user", "content": _text(given, "request")}]


def _said(returned: Any) -> dict[str, Any]:
    """Return the message of a response."""
    choices, listed = _key(returned, "choices"), _key(returned, "messages")
    if isinstance(choices, list) and choices and isinstance(_key(choices[0], "message"), Mapping):
        return _message(choices[0]["message"])
    if isinstance(listed, list) and listed and _key(listed[-1], "role") == "assistant":
        return _message(listed[-1])
    if _key(returned, "role") == "assistant":
        return _message(returned)
    return {"role": "assistant", "content": _text(returned, "response")}


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that ingest knows; services write others, mostly null."""
    message = {k: given[k] for k in _KNOWN if given.get(k) is not None}
    return {"role": "assistant", **message, "content": given.get("content")}


def _text(value: Any, what: str) -> str:
    """Return a text, that of an object with a single one, or a value as JSON."""
    if isinstance(value, Mapping) and len(value) == 1:
        (value,) = value.values()
    if value is None or value == "":
        raise ValueError(f"it has no {what}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _assessments(trace: Trace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the expectations and the feedback that count, by name."""
    expectations, feedback = {}, {}
    for assessment in trace.info.assessments or []:
        if assessment.valid is False:  # overridden by a later one
            continue
        if assessment.expectation is not None:
            expectations[assessment.name] = assessment.expectation.value
        elif assessment.feedback is not None:
            feedback[assessment.name] = assessment.feedback.value
    return expectations, feedback


def _expected(expectations: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the expectation that is the answer: by its name, or the only one that is a text."""
    texts = [(name, v) for name, v in expectations.items() if isinstance(v, str) and v]
    named = [(name, text) for name, text in texts if name in _EXPECTED]
    found = named or (texts if len(expectations) == 1 else [])
    return found[0] if found else None


def _key(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None
