"""The pipelines, in this process: a model through evaluation and the gate."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BeginFrom, tiny, write_traces
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import ConfigError, DatasetError, IntegrityError, Refused, TrackingError
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import arrays, bundle
from tunix_mlflow.pipelines.evaluate import evaluate
from tunix_mlflow.pipelines.promote import promote
from tunix_mlflow.pipelines.resume import resume_run
from tunix_mlflow.pipelines.train import train
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.models import flavor, gate, registry
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.run import open_run
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.training.trainer import Trainer


def config(**more: str) -> Config:
    more = {"dataset": "doubles-v1", "promotion__model": "doubles", **more}
    return load_config(None, tiny(**more))


def ingest_doubles(folder: Path) -> str:
    datasets.ingest(write_traces(folder / "doubles.jsonl", 60), "doubles-v1")
    return "doubles-v1"


@pytest.fixture
def doubles(tmp_path: Path) -> str:
    return ingest_doubles(tmp_path)


class Trained(NamedTuple):
    run_id: str
    model_id: str


@pytest.fixture
def trained(begin_from: BeginFrom, tmp_path: Path) -> Trained:
    """A run in a store of its own."""

    def make() -> Trained:
        ingest_doubles(tmp_path)
        return trained_model()

    return begin_from("trained", make)


def trained_model(**more: str) -> Trained:
    run_id = train(config(**more)).run_id
    return Trained(run_id, logged_model(run_id))


def logged_model(run_id: str) -> str:
    """The only model that a run logged."""
    outputs = MlflowClient().get_run(run_id).outputs
    assert outputs is not None
    (model,) = outputs.model_outputs
    return str(model.model_id)


class Messages:
    """A reporter that keeps the messages."""

    def __init__(self) -> None:
        self.text = ""

    def info(self, message: str) -> None:
        self.text += f"{message}\n"

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        pass


def log_score(model_id: str, value: float, dataset: str = "doubles-v1") -> None:
    """Put an evaluation's figure on a logged model, as `evaluate` does."""
    given = TunixMlflowDataset(datasets.get(dataset), "test")
    with open_run(stage="evaluate", tracking=config().tracking, report=print) as run:
        run.log_metrics({"eval/exact_match": value}, model_id=model_id, dataset=given)


def champion(name: str = "doubles") -> str | None:
    found = MlflowClient().get_registered_model(name).aliases.get("champion")
    return None if found is None else str(found)


def test_training_records_what_a_run_needs(trained: Trained) -> None:
    """Inputs, digests, the six figures, held-out figures, checkpoints, table, note, model."""
    client = MlflowClient()
    run = client.get_run(trained.run_id)
    assert run.info.status == "FINISHED"
    assert run.inputs is not None
    read = {i.dataset.name for i in run.inputs.dataset_inputs}
    assert read == {"doubles-v1/train", "doubles-v1/validation"}  # not the test split
    for tag in ("dataset", "tokenizer", "template", "config", "weights"):
        assert len(run.data.tags[f"tunix_mlflow.{tag}_digest"]) == 64
    for tag in ("jax", "device_kind", "threads", "version"):
        assert run.data.tags[f"tunix_mlflow.{tag}"]
    figures = """final_loss best_loss total_steps total_tokens avg_throughput wall_time
        train/loss train/grad_norm train/learning_rate validation/loss validation/exact_match
        train_perf/tokens_per_sec train_perf/step_time_ms"""
    for figure in figures.split():
        assert figure in run.data.metrics, figure
    assert "resume" in run.data.tags["mlflow.note.content"]
    paths = {f.path for f in client.list_artifacts(trained.run_id)}
    assert {"config.json", "metrics.jsonl", "checkpoints", "generations"} <= paths
    kept = [f.path for f in client.list_artifacts(trained.run_id, "checkpoints")]
    assert kept == ["checkpoints/00000002", "checkpoints/00000004"]
    fetched = client.download_artifacts(trained.run_id, kept[-1])
    assert arrays.check(Path(fetched))["step"] == 4
    model = client.get_logged_model(trained.model_id)
    assert model.source_run_id == trained.run_id
    assert model.tags["tunix_mlflow.weights_digest"] == run.data.tags["tunix_mlflow.weights_digest"]


def test_the_flavor_holds_no_code(trained: Trained, tmp_path: Path) -> None:
    """Orbax and JSON only; signature and example; the same answers natively and by pyfunc."""
    uri = f"models:/{trained.model_id}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    assert not [p for p in folder.rglob("*") if p.suffix in (".py", ".pkl", ".pickle", ".pyc")]
    info = mlflow.models.get_model_info(uri)
    assert info.signature.inputs is None  # MLflow would drop what a schema does not name
    assert info.saved_input_example_info is not None
    assert "tunix-mlflow" in (folder / "requirements.txt").read_text()
    prompts = ["Double 3", "Double 44"]
    model = mlflow.pyfunc.load_model(uri)
    answers = model.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 5})
    assert list(answers.columns) == ["text", "answer", "finish_reason", "error"]
    native = flavor.load_model(uri).complete([bundle.prompt(p) for p in prompts], 5)
    assert list(answers.itertuples(index=False, name=None)) == native
    with pytest.raises(mlflow.MlflowException, match="max_new_tokens is -1"):
        model.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": -1})
    assert len(model.predict(pd.DataFrame({"prompt": []}, dtype=str))) == 0


def test_a_damaged_model_does_not_load(trained: Trained) -> None:
    """One bit in any file of the bundle, and loading refuses, naming the file."""
    model = MlflowClient().get_logged_model(trained.model_id)
    folder = Path(model.artifact_location.removeprefix("file://")) / "bundle"
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 4
    for path in files:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            flavor.load_model(f"models:/{trained.model_id}")
        path.write_bytes(good)
    assert flavor.load_model(f"models:/{trained.model_id}")


def test_the_held_out_loss_is_that_of_training(trained: Trained) -> None:
    """On the same split and rendering, by the logged model: up to rounding."""
    scored = evaluate(trained.run_id, config=config(evaluation__split="validation"))
    client = MlflowClient()
    measured = client.get_run(scored.run_id).data.metrics["eval/loss"]
    assert measured == pytest.approx(client.get_run(trained.run_id).data.metrics["validation/loss"])


def test_evaluation_is_tied_to_model_and_dataset(trained: Trained) -> None:
    """The figure with its interval stands on the logged model, under the dataset's digest."""
    scored = evaluate(trained.run_id, config=config())
    assert scored.model_id == trained.model_id
    assert scored.low is not None
    assert scored.high is not None
    assert scored.exact_match is not None
    assert scored.low <= scored.exact_match <= scored.high
    client = MlflowClient()
    metrics = client.get_logged_model(trained.model_id).metrics or []
    found = {m.dataset_name: m.run_id for m in metrics if m.key == "eval/exact_match"}
    assert found == {"doubles-v1/test": scored.run_id}
    measured = {m.dataset_name: m.run_id for m in metrics if m.key == "validation/exact_match"}
    assert measured == {"doubles-v1/validation": trained.run_id}
    run = client.get_run(scored.run_id)
    assert run.inputs is not None
    assert [m.model_id for m in run.inputs.model_inputs] == [trained.model_id]
    table = client.download_artifacts(scored.run_id, "examples.json")
    assert len(json.loads(Path(table).read_text())["data"]) == scored.examples
    with pytest.raises(DatasetError, match="no example in split 'dev'"):
        evaluate(trained.run_id, config=config(evaluation__split="dev"))


def test_the_gate(trained: Trained) -> None:
    """Not evaluated, below the threshold, the first champion, equal weights, a regression."""
    least = {"promotion__thresholds__exact_match": "0.8"}
    with pytest.raises(Refused, match="never evaluated"):
        promote(trained.run_id, config=config(**least))
    assert champion() is None
    log_score(trained.model_id, 0.5)
    with pytest.raises(Refused, match=r"eval/exact_match is 0.5000 .* required 0.8000"):
        promote(trained.run_id, config=config(**least))
    client = MlflowClient()
    registered = client.get_registered_model("doubles")
    aliases = {alias: str(version) for alias, version in registered.aliases.items()}
    assert aliases == {"challenger": "1"}
    assert "refused" in client.get_model_version("doubles", "1").tags["tunix_mlflow.promotion"]
    log_score(trained.model_id, 0.9)
    done = promote(trained.run_id, config=config(**least))
    assert (done.version, done.changed, champion()) == ("1", True, "1")
    again = promote(f"models:/{trained.model_id}", config=config(**least))
    assert (again.version, again.changed) == ("1", False)

    other = trained_model(seed="1")
    log_score(other.model_id, 0.85)
    with pytest.raises(Refused, match=r"champion version 1 has 0\.9000"):
        promote(other.run_id, config=config(**least))
    assert champion() == "1"
    log_score(other.model_id, 0.95)
    assert promote(other.run_id, config=config(**least)).version == "2"
    assert champion() == "2"
    assert len(client.search_model_versions("name = 'doubles'")) == 2
    failed = client.search_runs(
        [client.get_run(trained.run_id).info.experiment_id],
        "tags.`tunix_mlflow.stage` = 'promote' and attributes.status = 'FAILED'",
    )
    assert all("not promoted" in run.data.tags["tunix_mlflow.error"] for run in failed)
    assert len(failed) == 3


def test_a_champion_without_the_figure_must_be_measured_first(
    trained: Trained, tmp_path: Path
) -> None:
    """A new model is never compared with a figure of other data."""
    log_score(trained.model_id, 0.9)
    promote(trained.run_id, config=config())
    datasets.ingest(write_traces(tmp_path / "more.jsonl", 90), "doubles-v2")
    other = trained_model(seed="2")
    log_score(other.model_id, 1.0, "doubles-v2")
    with pytest.raises(Refused, match="evaluate models:/doubles@champion on it first"):
        promote(other.run_id, config=config(dataset="doubles-v2"))
    log_score(trained.model_id, 0.7, "doubles-v2")
    assert promote(other.run_id, config=config(dataset="doubles-v2")).version == "2"


def test_integrity_comes_before_registration(trained: Trained) -> None:
    """What is not whole is refused, and the registry does not even hear of it.

    A run that did not finish, other weights, no digest of the data, files that are damaged, swapped
    or of other code.
    """
    client = MlflowClient()
    log_score(trained.model_id, 1.0)
    run = client.get_run(trained.run_id)
    folder = package(trained.model_id)
    good = folder.with_name("good")
    shutil.copytree(folder, good)

    def refused(message: str) -> None:
        with pytest.raises(IntegrityError, match=message):
            promote(trained.run_id, config=config())
        assert client.search_registered_models() == []
        shutil.rmtree(folder)
        shutil.copytree(good, folder)

    client.set_terminated(trained.run_id, "KILLED")
    refused("KILLED")
    client.set_terminated(trained.run_id, "FINISHED")
    client.set_tag(trained.run_id, tags.WEIGHTS_DIGEST, "0" * 64)
    refused("its run has weights digest 0000")
    client.set_tag(trained.run_id, tags.WEIGHTS_DIGEST, run.data.tags[tags.WEIGHTS_DIGEST])
    client.delete_tag(trained.run_id, tags.DATASET_DIGEST)
    refused("does not say what data")
    client.set_tag(trained.run_id, tags.DATASET_DIGEST, run.data.tags[tags.DATASET_DIGEST])
    shutil.rmtree(folder / "bundle" / "params" / "d")
    refused("params/d")
    shutil.rmtree(folder / "bundle")
    shutil.copytree(package(trained_model(seed="3").model_id) / "bundle", folder / "bundle")
    refused("package digest")
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace("tunix_mlflow.tracking.models.flavor", "evil"))
    refused("served by code that is not")
    assert promote(trained.run_id, config=config()).changed


def package(model_id: str) -> Path:
    """Where the store has a model's files."""
    location = MlflowClient().get_logged_model(model_id).artifact_location
    return Path(location.removeprefix("file://"))


def test_models_of_others_are_refused(store: str, doubles: str) -> None:
    """An external model and one of another flavor never pass the gate."""
    client = MlflowClient()
    with mlflow.start_run() as run:
        external = mlflow.create_external_model(name="external")
    with pytest.raises((IntegrityError, TrackingError)):
        promote(f"models:/{external.model_id}", config=config())
    with pytest.raises(TrackingError, match="has logged no model"):
        registry.resolve(client, run.info.run_id)
    for nothing in ("models:/absent@champion", "models:/absent/1", "m-0", "0" * 32, "models:/"):
        with pytest.raises(TrackingError, match="there is no model"):
            registry.resolve(client, nothing)
    assert client.search_registered_models() == []


def test_equal_runs_have_equal_weights(trained: Trained) -> None:
    """The same configuration on the same data gives the same bits."""
    again = train(config())
    client = MlflowClient()
    digests = {
        client.get_run(r).data.tags["tunix_mlflow.weights_digest"]
        for r in (trained.run_id, again.run_id)
    }
    assert len(digests) == 1


def test_no_validation_split_is_said(store: str, tmp_path: Path) -> None:
    """Training continues without validation figures; evaluating without a test split is refused."""
    path = write_traces(tmp_path / "all.jsonl", 20, split="train")
    datasets.ingest(path, "all-v1")
    messages = Messages()
    alone = config(dataset="all-v1", data__validation_split="none")
    trained = train(alone, reporter=messages)
    assert "no examples in split 'none': there is no validation loss" in messages.text
    assert not any(key.startswith("validation/") for key in trained.figures)
    with pytest.raises(DatasetError, match="no example in split 'test'"):
        evaluate(trained.run_id, config=alone)


def test_bad_input_starts_no_run(store: str, doubles: str) -> None:
    """An absent dataset, split or key is found before MLflow hears of a run."""
    for change, error in (
        ({"dataset": "absent-v1"}, DatasetError),
        ({"data__train_split": "nope"}, DatasetError),
        ({"data__sequence_length": "16"}, DatasetError),
        ({"dataset": "Absent"}, DatasetError),
    ):
        with pytest.raises(error):
            train(config(**change))
    with pytest.raises(ConfigError, match="dataset is missing"):
        train(Config())
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert client.search_runs(experiments) == []


def test_only_the_whole_held_out_figure_counts(trained: Trained) -> None:
    """A part of the split, a split that training read, or another length of answer fool no gate."""
    for change, reason in (
        ({"evaluation__limit": "1"}, "evaluation.limit is set"),
        ({"evaluation__max_new_tokens": "3"}, "is not the model's own 4"),
        ({"evaluation__split": "train"}, "the model was trained on doubles-v1/train"),
        ({"evaluation__split": "validation"}, "the model was chosen by doubles-v1/validation"),
    ):
        messages = Messages()
        evaluate(trained.run_id, config=config(**change), reporter=messages)
        assert reason in messages.text
    least = config(promotion__thresholds__exact_match="0")
    with pytest.raises(Refused, match="never evaluated"):
        promote(trained.run_id, config=least)
    evaluate(trained.run_id, config=config())
    assert promote(trained.run_id, config=least).changed


def test_equal_weights_alone_are_not_the_same_model(trained: Trained) -> None:
    """A model that answers at another length is another version, judged by its own figures."""
    log_score(trained.model_id, 0.9)
    promote(trained.run_id, config=config())
    other = train(config(evaluation__max_new_tokens="9"))
    with pytest.raises(Refused, match="version 2 is not promoted: it was never evaluated"):
        promote(other.run_id, config=config())
    assert champion() == "1"


def test_a_name_that_cannot_be_registered(trained: Trained) -> None:
    """Refused before the registry hears of it."""
    client = MlflowClient()
    model = registry.resolve(client, trained.run_id)
    for name in ("it's", "a/b", "", "x:y", "\n"):
        with pytest.raises(ConfigError, match="cannot be registered"):
            gate.promote(client, model, name, thresholds={"exact_match": 0}, dataset=None)
    assert client.search_registered_models() == []


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_leaves_a_split_to_evaluate_on(store: str, doubles: str, split: str) -> None:
    """A configuration that names what training reads as evaluation.split is refused."""
    with pytest.raises(ConfigError, match=f"evaluation.split is '{split}', which training reads"):
        train(config(evaluation__split=split))


def test_an_offline_run_is_resumed_offline(
    store: str, doubles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration says where it is recorded; a launcher's run is left alone."""
    client = MlflowClient()
    launched = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    before = dict(os.environ)

    def step(self: Trainer, batch: Batch) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config(tracking__offline="true"))
    (folder,) = lookup.folders()
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == store
    assert dict(os.environ) == before
    found = resume_run(folder.name, {})
    assert found.config.tracking.offline
    assert set(found.environment) == {"NPROC", "XLA_FLAGS"}
    assert train(found.config, resume=found.point).run_id == folder.name != launched
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == store
    assert dict(os.environ) == before
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert (run.info.run_id, run.info.status) == (launched, "RUNNING")
