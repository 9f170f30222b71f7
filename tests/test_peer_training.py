"""Training equals a plain PyTorch loop: tests/golden/training.py, run by `make golden`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import save_file

from tests.golden import training as peer
from tests.golden.make import weights
from tests.templates.conversations import CONVERSATIONS
from tunix_mlflow.config.load import load_config
from tunix_mlflow.data import datasets
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.runtime import devices
from tunix_mlflow.training.inputs import read_inputs

pytestmark = pytest.mark.usefixtures("quick_compile")
EXPECTED = json.loads(peer.GOLDEN.read_text())
UNMARKED = re.sub(r"{% (end)?generation %}", "", peer.MARKED)


def folder_of(model: str, template: str, folder: Path) -> Path:
    """The first weights and the tokenizer, as a model of transformers."""
    saved = EXPECTED["models"][model]
    folder.mkdir()
    gemma = model.startswith("gemma")
    tensors = {k: weights(k, tuple(shape), gemma) for k, shape in saved["tensors"].items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(saved["config"]))
    (folder / "tokenizer.json").write_text(EXPECTED["tokenizer"])
    settings = peer.SETTINGS | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("model", "template", "packing"),
    [
        ("qwen3", peer.MARKED, False),
        ("qwen3", UNMARKED, True),
        ("gemma3", peer.MARKED, True),
    ],
)
def test_losses_and_gradients(
    model: str, template: str, packing: bool, store: str, tmp_path: Path
) -> None:
    """20 updates of chats with tools, calls and thoughts: within 1e-5 of PyTorch's."""
    rows = [
        {"messages": messages} | ({"tools": tools} if tools else {})
        for messages, tools in (CONVERSATIONS[name] for name in peer.NAMES)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.ingest(chats, "chats-v1", splits={"train": 1.0})
    given = {
        **{"dataset": "chats-v1", "base": str(folder_of(model, template, tmp_path / "base"))},
        **{"data.packing": str(packing).lower(), "data.sequence_length": "512"},
        **{"training.steps": str(peer.STEPS), "training.batch_size": str(len(rows))},
        **{"training.eval_every_steps": "0", "training.save_every_steps": "0"},
        **{"optimizer.learning_rate": str(peer.PEAK), "optimizer.clip_norm": str(peer.CLIP)},
        **{"optimizer.warmup_steps": str(peer.WARMUP)},
        **{"optimizer.final_fraction": str(peer.FINAL), "optimizer.weight_decay": str(peer.DECAY)},
        **{"optimizer.b1": str(peer.B1), "optimizer.b2": str(peer.B2)},
    }
    config = load_config(None, given)
    inputs = read_inputs(
        config, datasets.get("chats-v1"), devices.use("cpu"), bases.find(tmp_path / "base")
    )
    trained = sum(int(inputs.train.example(n)[1][1:].sum()) for n in range(len(rows)))
    assert trained == EXPECTED["trained_tokens"]
    count = len(inputs.train.rows)
    assert (count < len(rows)) is packing
    # Every update sees all conversations, as in the other loop.
    run = train(load_config(None, given | {"training.batch_size": str(count)}))
    client = MlflowClient()
    for metric in ("loss", "grad_norm"):
        history = client.get_metric_history(run.run_id, f"train/{metric}")
        values = [m.value for m in sorted(history, key=lambda m: m.step)]
        np.testing.assert_allclose(values, EXPECTED["models"][model][metric], rtol=1e-5)
