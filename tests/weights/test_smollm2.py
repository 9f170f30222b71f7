"""Real weights: SmolLM2-135M-Instruct from its GGUF, against what transformers makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import ROOT
from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message
from tunix_mlflow.models import decoder, generation
from tunix_mlflow.models.bundle import Bundle
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import export, pretrained

pytestmark = pytest.mark.weights
FILE = Path(os.environ.get("TUNIX_SMOLLM2", "nowhere"))
GOLDEN = json.loads(Path(__file__).with_name("smollm2.json").read_text())


@pytest.fixture(scope="module")
def base() -> bases.Base:
    return bases.find(FILE)


@pytest.fixture(scope="module")
def params(base: bases.Base) -> decoder.Params:
    return bases.load(base, lambda array, _: jax.device_put(array))[0]


@pytest.fixture(scope="module")
def folder(
    base: bases.Base, params: decoder.Params, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model in Hugging Face's layout."""
    path = tmp_path_factory.mktemp("smollm2") / "model"
    graph = decoder.shape(base.config, base.config.vocab_size or 0)[0]
    export.merged(Bundle(base.config, graph, params, base.tokenizer, 16), path)
    return path


def test_the_tokenizer_is_transformers(base: bases.Base) -> None:
    """Text, and a conversation by the model's own template."""
    asked = Example(messages=(Message(role="user", content="What is 12 + 30?"),), answer="42")
    assert base.tokenizer.encode_prompt(asked, DataConfig()).tolist() == GOLDEN["chat_ids"]


def test_perplexity_and_greedy_text_are_transformers(
    base: bases.Base, params: decoder.Params
) -> None:
    """Within 0.1 %; token by token."""
    graph = decoder.shape(base.config, base.config.vocab_size or 0)[0]
    ids = np.asarray(GOLDEN["ids"], np.int32)
    model = nnx.merge(graph, params)
    mask = decoder.segment_mask(jnp.ones((1, len(ids)), jnp.int32))
    logits = model(jnp.asarray(ids)[None], jnp.arange(len(ids))[None], mask)[0][0]
    log_probabilities = jax.nn.log_softmax(logits[:-1].astype(jnp.float32))
    loss = -float(jnp.mean(log_probabilities[jnp.arange(len(ids) - 1), ids[1:]]))
    assert np.exp(loss) == pytest.approx(np.exp(GOLDEN["loss"]), rel=1e-3)
    prompt = np.asarray(base.tokenizer._encode("The capital of France is")[1], np.int32)
    (completion,) = generation.generate(
        graph,
        params,
        [prompt],
        limits=[len(GOLDEN["greedy"])],
        eos_ids=(),
        pad_id=0,
    )
    assert completion.ids.tolist() == GOLDEN["greedy"]
    assert "Paris" in base.tokenizer.decode(completion.ids)


def test_export_and_import_is_the_same(
    base: bases.Base, params: decoder.Params, folder: Path
) -> None:
    """GGUF, safetensors, and again: the same bits, the same tokenizer."""
    again = bases.find(folder)
    assert again.config == base.config
    assert again.tokenizer.template == base.tokenizer.template
    asked = Example(messages=(Message(role="user", content="Hi 2024!"),), answer="")
    assert np.array_equal(
        again.tokenizer.encode_prompt(asked, DataConfig()),
        base.tokenizer.encode_prompt(asked, DataConfig()),
    )
    back, _ = bases.load(again, lambda array, _: array)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


_IMPORT = """
import re, sys, time
from pathlib import Path
import jax
from tunix_mlflow.models.hub import base as bases
def anonymous():
    found = re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024
jax.device_put(0.0).block_until_ready()
base = bases.find(Path(sys.argv[1]))
before, peak = anonymous(), 0
start = time.perf_counter()
def put(array, leaf):
    global peak
    result = jax.device_put(array)
    peak = max(peak, anonymous())
    return result
params, _ = bases.load(base, put)
jax.block_until_ready(params)
seconds = time.perf_counter() - start
peak = max(peak, anonymous())
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(f"{seconds:.2f} {(peak - before) / size:.3f}")
"""


def test_import_takes_little_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 1.3 times the model, in float32; the time is printed."""
    words: list[Any] = [sys.executable, "-c", _IMPORT, folder]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    took, share = map(float, done.stdout.split())
    with capsys.disabled():
        print(f"\nimported in {took:.2f} s, {share:.2f} times its size in memory at most")
    assert share <= 1.3


def test_pretrained_reads_its_own(folder: Path) -> None:
    """The layout that other tools read."""
    assert pretrained.resolve(folder) == folder
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


_TRAIN = """
import re, sys, threading, time
from pathlib import Path
from tunix_mlflow.config.load import load_config
from tunix_mlflow.runtime.environment import export
config = load_config(None, dict(word.split("=", 1) for word in sys.argv[2:]))
export(config)
import jax
from tunix_mlflow.benchmarks import workload
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.runtime import devices
from tunix_mlflow.training import state as states
def anonymous():
    found = re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024
init_state = states.init_state
def measured(spec, params, device):  # the weights are read, nothing else is there yet
    global baseline
    devices.return_freed_memory()
    baseline = anonymous()
    return init_state(spec, params, device)
states.init_state = measured
work = workload.generated(config, devices.use("cpu"), bases.find(Path(sys.argv[1])))
peak, is_over = 0, False
def watch():
    global peak
    while not is_over:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
work.trainer.compile(work.batches.at(0))
devices.return_freed_memory()
start = 0.0
for index in range(3):
    if index == 1:
        start = time.perf_counter()
    work.trainer.step(work.batches.at(index))
    jax.block_until_ready(work.trainer.state)
is_over = True
thread.join()
print((peak - baseline) / 1e6, 2 * 1024 / (time.perf_counter() - start))
"""


def test_adapters_take_little_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA, compiling included, takes at most 40 % of the memory of full fine-tuning."""
    took = {}
    for way, rank in (("whole", 0), ("adapters", 16)):
        words = [str(folder), f"base={folder}", f"lora.rank={rank}", "device=cpu"]
        words += ["data.sequence_length=256", "training.batch_size=4", "training.fused=false"]
        done = subprocess.run(
            [sys.executable, "-c", _TRAIN, *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        took[way], rate = map(float, done.stdout.split())
        with capsys.disabled():
            print(f"\n{way}: {took[way]:,.0f} MB beside the model, {rate:.0f} tokens/s")
    assert took["adapters"] <= 0.4 * took["whole"]
