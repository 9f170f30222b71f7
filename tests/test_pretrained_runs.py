"""Runs that begin with a pretrained model: whole or by adapters, resumed, handed on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import mlflow
import msgspec
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file, save_file

from tests.conftest import as_arguments, run_here, tiny, write_traces
from tests.test_hub_tokenizer import CHATML, files
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config, ModelConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import (
    Interrupted,
    ModelError,
    TrackingError,
    UnavailableError,
)
from tunix_mlflow.input.batches import Batch, TrainBatches
from tunix_mlflow.models import arrays, decoder
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import names, pretrained
from tunix_mlflow.pipelines.resume import ResumePoint
from tunix_mlflow.pipelines.train import plan, train
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.memory import Allowance
from tunix_mlflow.tracking import artifacts
from tunix_mlflow.tracking.models import flavor
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.training import memory
from tunix_mlflow.training.inputs import read_inputs
from tunix_mlflow.training.step import StepMetrics
from tunix_mlflow.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPE = ModelConfig(
    family="qwen3",
    width=24,
    heads=4,
    head_dim=8,
    mlp_width=40,
    vocab_size=280,
    max_positions=256,
    tie_embeddings=False,
)
LORA = {"lora__rank": "4", "optimizer__learning_rate": "0.01"}


def written(place: Path, seed: int = 0) -> Path:
    """A small model with its tokenizer, as others would hand it to us."""
    params = decoder.init(SHAPE, SHAPE.vocab_size or 0, seed)
    pretrained.save(place, SHAPE, params, files=files(CHATML), tokens={"eos_token_id": 0})
    return place


@pytest.fixture
def folder(tmp_path: Path, store: str) -> Path:
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    return written(tmp_path / "pretrained")


def given(folder: Path, **more: str) -> dict[str, str]:
    small = {
        **{"dataset": "doubles-v1", "training__steps": "8", "evaluation__samples": "0"},
        **{"base": str(folder), "training__save_every_steps": "4"},
    }
    return {k: v for k, v in tiny(**(small | more)).items() if not k.startswith("model.")}


def config(folder: Path, **more: str) -> Config:
    return load_config(None, given(folder, **more))


def model_of(run_id: str) -> str:
    outputs = MlflowClient().get_run(run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    return str(output.model_id)


def losses(run_id: str) -> list[float]:
    found = MlflowClient().get_metric_history(run_id, "train/loss")
    return [m.value for m in sorted(found, key=lambda m: m.step)]


def trainer_and_batches(chosen: Config, folder: Path | None) -> tuple[Trainer, TrainBatches]:
    """What `train` trains with; the step is compiled ahead."""
    manifest, device = datasets.ready("doubles-v1", print), devices.use("cpu")
    base = None if folder is None else bases.find(folder)
    inputs = read_inputs(chosen, manifest, device, base)
    trainer = Trainer.create(inputs.config, inputs.vocab_size, device, base, compile_ahead=True)
    return trainer, inputs.train_batches()


@pytest.mark.parametrize(
    "way", [{}, LORA, LORA | {"lora__dropout": "0.3", "training__remat": "block"}]
)
def test_killed_and_resumed_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, str]
) -> None:
    """Whole, by adapters, in a loop with dropout: the same bits. What is frozen is not saved."""
    whole = train(config(folder, **way))
    values = losses(whole.run_id)
    assert values[-1] < values[0]
    real, calls = Trainer.step, 0

    def dying(self: Trainer, batch: Batch) -> StepMetrics:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", dying)
        with pytest.raises(Interrupted):
            train(config(folder, **way))
    client = MlflowClient()
    experiment = client.get_run(whole.run_id).info.experiment_id
    (killed, *_) = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    run_id = killed.info.run_id
    assert killed.info.status == "KILLED"
    train(config(folder, **way), resume=ResumePoint(run_id))
    assert losses(run_id) == values
    tags = [
        client.get_run(r).data.tags["tunix_mlflow.weights_digest"] for r in (run_id, whole.run_id)
    ]
    assert tags[0] == tags[1]
    assert run_here("runs", "verify", run_id) == 0
    if way:
        trainer, _ = trainer_and_batches(config(folder, **way), folder)
        held = arrays.flatten(trainer.state.params)  # what a checkpoint holds
        assert held
        assert all("/lora_" in name for name in held)


@pytest.mark.parametrize("way", [{}, LORA, LORA | {"training__remat": "block"}, None])
def test_a_step_is_compiled_once(folder: Path, way: dict[str, str] | None) -> None:
    """All updates find what was compiled ahead, before there were parameters; of a base, and from
    scratch."""
    chosen = config(folder, **(way or {}))
    if way is None:
        chosen = msgspec.structs.replace(chosen, base=None)
    trainer, stream = trainer_and_batches(chosen, None if way is None else folder)
    assert trainer.compile(stream.at(0)) > 0
    compiled: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    for index in range(3):
        trainer.step(stream.at(index))
    assert compiled == []


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """By its weights, wherever they lie; the same ones elsewhere are welcome."""
    run_id = train(config(folder, **LORA)).run_id
    kept = folder.with_name("kept")
    folder.rename(kept)
    written(folder, seed=1)
    with pytest.raises(TrackingError, match="base_digest"):
        train(config(folder, **LORA, training__steps="10"), resume=ResumePoint(run_id))
    shutil.rmtree(folder)
    kept.rename(folder)
    train(config(folder, **LORA, training__steps="10"), resume=ResumePoint(run_id))
    assert len(losses(run_id)) == 10


def test_what_was_trained_is_handed_on(folder: Path, tmp_path: Path) -> None:
    """The logged model answers prompts and conversations, and goes out merged or as an adapter."""
    run_id = train(config(folder, **LORA, evaluation__samples="2")).run_id
    bundle = flavor.load_model(f"models:/{model_of(run_id)}")
    assert bundle.adapter is not None
    served = mlflow.pyfunc.load_model(f"models:/{model_of(run_id)}")
    asked = served.predict(pd.DataFrame({"prompt": ["What is 2 doubled?"]}))
    said = [{"role": "user", "content": "What is 2 doubled?"}]
    chat = served.predict(pd.DataFrame({"messages": [said]}))
    assert asked.equals(chat)
    mixed = served.predict(["What is 2 doubled?", "long " * 200, [{"role": "user"}]])
    assert mixed["text"].tolist() == [asked["text"][0], None, None]
    assert "has 256 positions" in mixed["error"][1]
    assert "messages[0].content" in mixed["error"][2]

    assert run_here("models", "export", run_id, str(tmp_path / "out")) == 0
    assert run_here("models", "export", run_id, str(tmp_path / "out")) == 2
    (tmp_path / "file").write_text("")
    assert run_here("models", "export", run_id, str(tmp_path / "file" / "out")) == 2
    found = bases.find(tmp_path / "out")
    assert found.config == SHAPE
    params, _ = bases.load(found, lambda array, _: array)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(bundle.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    assert run_here("models", "export", run_id, str(tmp_path / "peft"), "--adapter") == 0
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    said_ = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert len(adapter) == 2 * 7 * SHAPE.layers
    original, _ = bases.load(bases.find(folder), lambda array, _: array)
    down = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    wide = adapter[down.format("B")] @ adapter[down.format("A")]
    kernel = _named(original)["model.layers.1.mlp.down_proj.weight"]
    merged = _named(bundle.params)["model.layers.1.mlp.down_proj.weight"]
    scale = said_["lora_alpha"] / said_["r"]
    assert np.allclose(kernel.T + scale * wide, merged.T, atol=1e-6)


def test_a_logged_model_is_a_base(folder: Path, store: str) -> None:
    """By its registered name, which is resolved when the run begins; merged, and by digest."""
    first = train(config(folder, **LORA))
    client = MlflowClient()
    model_id = model_of(first.run_id)
    client.create_registered_model("doubles")
    version = client.create_model_version("doubles", f"models:/{model_id}", model_id=model_id)
    client.set_registered_model_alias("doubles", "champion", version.version)
    chosen = config(folder, base="models:/doubles@champion", training__steps="4")
    second = train(chosen)
    tags = client.get_run(second.run_id).data.tags
    with artifacts.local(f"models:/{model_id}") as merged:
        params, digest = bases.load(bases.find(merged), lambda array, _: array)
    assert tags["tunix_mlflow.base_digest"] == digest
    bundle = flavor.load_model(f"models:/{model_id}")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(bundle.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert lookup.look_up(second.run_id, print).config.base == f"models:/{model_id}"
    # Where the alias points later is of no matter to the run.
    client.delete_registered_model_alias("doubles", "champion")
    before = losses(second.run_id)
    assert run_here("resume", second.run_id, "training.steps=6") == 0
    assert losses(second.run_id)[:4] == before
    assert len(losses(second.run_id)) == 6


def test_a_model_of_bytes_is_no_base(store: str, tmp_path: Path) -> None:
    """It is trained further by beginning a run at its checkpoint, which the line says."""
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    small = tiny(dataset="doubles-v1", training__steps="2", evaluation__samples="0")
    run_id = train(load_config(None, small)).run_id
    other = load_config(None, small | {"base": f"models:/{model_of(run_id)}"})
    with pytest.raises(ModelError, match="--fork dataset=KEY"):
        train(other)


def _named(params: decoder.Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in names.named(params, SHAPE).items()}


def test_a_logged_folder_is_a_base_too(folder: Path) -> None:
    """As an artifact of a run; and a pretrained model is logged as it is, to be evaluated."""
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), "base")
    uri = f"runs:/{run.info.run_id}/base"
    there = train(config(folder, **(LORA | {"base": uri})))
    here = train(config(folder, **LORA))
    assert losses(there.run_id) == losses(here.run_id)
    assert run_here("models", "import", str(folder), "--max-new-tokens", "8") == 0
    (logged,) = [
        m
        for m in MlflowClient().search_logged_models(
            [e.experiment_id for e in MlflowClient().search_experiments()]
        )
        if m.source_run_id not in (there.run_id, here.run_id)
    ]
    assert run_here("evaluate", logged.model_id, "--dataset", "doubles-v1") == 0


def test_what_cannot_fit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is allocated, with what would fit; --force trains anyway."""
    foreseen = plan(config(folder, data__sequence_length="64"))
    available = foreseen.bytes["total"] - 1
    allowed = Allowance(available, "the test")
    monkeypatch.setattr(memory, "device_capacity", lambda device, count: allowed)
    with pytest.raises(UnavailableError, match=r"What would fit: .*lora.rank"):
        train(config(folder, data__sequence_length="64"))
    assert MlflowClient().search_runs(["0"]) == []
    words = as_arguments(given(folder, data__sequence_length="64", training__steps="2"))
    assert run_here("train", "--force", *words) == 0
    assert "training anyway" in capsys.readouterr().err


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No such folder, adapters of nothing, another shape, a sequence too long, a damaged shard."""
    words = ("train", "dataset=doubles-v1")
    for arguments, message in (
        ((f"base={folder}x",), "there is no"),
        (("lora.rank=4",), "set base"),
        ((f"base={folder}", "lora.rank=4", "lora.targets=[]"), "lora.targets is empty"),
        ((f"base={folder}", "model.width=64"), "differs from the shape"),
        ((f"base={folder}", "data.sequence_length=512"), "made for"),
        ((f"base={folder}", "lora.targets=[q]"), "lora.targets"),
    ):
        assert run_here(*words, *arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1]
        assert not any("Traceback" in line for line in said)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, weights)
    assert run_here(*words, f"base={folder}") == 2
    assert "has shape" in capsys.readouterr().err
    assert MlflowClient().search_runs(["0"]) == []


def test_inspect_reads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shape, tokenizer, and what ways of training need; as JSON too."""
    assert run_here("models", "inspect", str(folder), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "qwen3"
    assert said["bytes"]["full, float32"]["total"] > said["bytes"]["LoRA 16, bfloat16"]["total"]
    assert run_here("models", "inspect", str(folder)) == 0
    assert "141 GB" in capsys.readouterr().out
    with pytest.raises(ModelError):
        bases.find(folder / "nowhere")
