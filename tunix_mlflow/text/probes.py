"""Small conversations by which it shows what a model's chat template keeps."""

from __future__ import annotations

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text import fidelity
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

_ASKED = Message(role="user", content="probe-question")
_SAID = Message(role="assistant", content="probe-answer")
_CALL = (
    '[{"type":"function","function":{"name":"probe_call","arguments":{"probe_key":"probe-value"}}}]'
)
_TOOL = (
    '[{"type":"function","function":{"name":"probe_call","description":"probe-description",'
    '"parameters":{"type":"object","properties":{"probe_key":{"type":"string"}}}}}]'
)
_PROBES = {
    "chat": Example(messages=(_ASKED, _SAID, _ASKED, _SAID)),
    "system": Example(messages=(Message(role="system", content="probe-system"), _ASKED, _SAID)),
    "thought": Example(
        messages=(
            _ASKED,
            Message(role="assistant", content="probe-answer", reasoning="probe-thought"),
        )
    ),
    "earlier thought": Example(
        messages=(
            _ASKED,
            Message(role="assistant", content="probe-answer", reasoning="probe-thought"),
            Message(role="user", content="probe-more"),
            Message(role="assistant", content="probe-last"),
        )
    ),
    "tools": Example(
        messages=(_ASKED, Message(role="assistant", content="", tool_calls=_CALL)), tools=_TOOL
    ),
}


def losses(tokenizer: HubTokenizer) -> dict[str, str]:
    """Return what becomes of a plain chat, a thought, a call with tools, and a system message.

    Each is `kept`, or says what is missing (see fidelity), or why the template refuses it.
    """
    results = {}
    for name, example in _PROBES.items():
        try:
            findings = tokenizer.encode_example(example, DataConfig()).findings
        except (DatasetError, ModelError) as error:
            results[name] = str(error).removeprefix(f"{tokenizer.where}: ")
            continue
        kinds = dict.fromkeys(f.kind for f in findings if f.kind != fidelity.SPACE)
        missing = "; ".join(fidelity.KINDS[kind] for kind in kinds)
        results[name] = missing or "kept"
    return results
