"""The pipelines, in this process: a model through evaluation and the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import tiny, write_traces
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets
from tunix_mlflow.errors import ConfigError, DatasetError, IntegrityError, Refused, TrackingError
from tunix_mlflow.models import arrays, bundle
from tunix_mlflow.pipelines.evaluate import evaluate
from tunix_mlflow.pipelines.promote import promote
from tunix_mlflow.pipelines.train import TrainResult, train
from tunix_mlflow.tracking.models import flavor, gate, registry
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.run import open_run


def config(**more: str) -> Config:
    more = {"dataset": "doubles-v1", "promotion__model": "doubles", **more}
    return load_config(None, tiny(**more))


@pytest.fixture
def doubles(tmp_path: Path) -> str:
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    return "doubles-v1"


@pytest.fixture
def trained(store: str, doubles: str) -> TrainResult:
    return train(config())


def log_score(model_id: str, value: float, dataset: str = "doubles-v1") -> None:
    """Put an evaluation's figure on a logged model, as `evaluate` does."""
    given = TunixMlflowDataset(datasets.get(dataset), "test")
    with open_run(stage="evaluate", tracking=config().tracking, report=print) as run:
        run.log_metrics({"eval/exact_match": value}, model_id=model_id, dataset=given)


def champion(name: str = "doubles") -> str | None:
    found = MlflowClient().get_registered_model(name).aliases.get("champion")
    return None if found is None else str(found)


def test_training_records_what_a_run_needs(trained: TrainResult) -> None:
    """Inputs, digests, the six figures, held-out figures, checkpoints, table, note, model."""
    client = MlflowClient()
    run = client.get_run(trained.run_id)
    assert run.info.status == "FINISHED"
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {
        "doubles-v1/train",
        "doubles-v1/validation",
    }
    for tag in ("dataset", "tokenizer", "template", "config", "weights"):
        assert len(run.data.tags[f"tunix_mlflow.{tag}_digest"]) == 64
    for tag in ("jax", "device_kind", "nproc", "version"):
        assert run.data.tags[f"tunix_mlflow.{tag}"]
    figures = """final_loss best_loss total_steps total_tokens avg_throughput wall_time
        train/loss train/grad_norm train/learning_rate eval/loss eval/exact_match
        perf/tokens_per_sec perf/step_time_ms"""
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


def test_the_flavor_holds_no_code(trained: TrainResult, tmp_path: Path) -> None:
    """Orbax and JSON only; signature and example; the same answers natively and by pyfunc."""
    uri = f"models:/{trained.model_id}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    assert not [p for p in folder.rglob("*") if p.suffix in (".py", ".pkl", ".pickle", ".pyc")]
    info = mlflow.models.get_model_info(uri)
    assert info.signature.inputs.input_names() == ["prompt", "messages"]
    assert info.saved_input_example_info is not None
    assert "tunix-mlflow" in (folder / "requirements.txt").read_text()
    prompts = ["Double 3", "Double 44"]
    model = mlflow.pyfunc.load_model(uri)
    answers = model.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 5})
    assert list(answers.columns) == ["text", "answer"]
    native = flavor.load_model(uri).complete([bundle.prompt(p) for p in prompts], 5)
    assert list(zip(answers["text"], answers["answer"], strict=True)) == native
    with pytest.raises(mlflow.MlflowException, match="max_new_tokens is -1"):
        model.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": -1})
    assert len(model.predict(pd.DataFrame({"prompt": []}, dtype=str))) == 0


def test_a_damaged_model_does_not_load(trained: TrainResult) -> None:
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


def test_evaluation_is_tied_to_model_and_dataset(trained: TrainResult) -> None:
    """The figure with its interval stands on the logged model, under the dataset's digest."""
    scored = evaluate(trained.run_id, config=config())
    assert scored.model_id == trained.model_id
    assert scored.low <= scored.exact_match <= scored.high
    client = MlflowClient()
    found = [
        m
        for m in client.get_logged_model(trained.model_id).metrics
        if m.key == "eval/exact_match" and m.dataset_digest
    ]
    assert [m.dataset_name for m in found] == ["doubles-v1/test"]
    run = client.get_run(scored.run_id)
    assert run.inputs.model_inputs[0].model_id == trained.model_id
    table = client.download_artifacts(scored.run_id, "examples.json")
    assert len(json.loads(Path(table).read_text())["data"]) == scored.examples
    with pytest.raises(DatasetError, match="no example with an answer in split 'dev'"):
        evaluate(trained.run_id, config=config(evaluation__split="dev"))


def test_the_gate(trained: TrainResult) -> None:
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

    other = train(config(seed="1"))
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
    trained: TrainResult, tmp_path: Path
) -> None:
    """A new model is never compared with a figure of other data."""
    log_score(trained.model_id, 0.9)
    promote(trained.run_id, config=config())
    datasets.ingest(write_traces(tmp_path / "more.jsonl", 90), "doubles-v2")
    other = train(config(seed="2"))
    log_score(other.model_id, 1.0, "doubles-v2")
    with pytest.raises(Refused, match="evaluate models:/doubles@champion on it first"):
        promote(other.run_id, config=config(dataset="doubles-v2"))
    log_score(trained.model_id, 0.7, "doubles-v2")
    assert promote(other.run_id, config=config(dataset="doubles-v2")).version == "2"


@pytest.mark.parametrize(
    "what",
    ["run not finished", "other weights", "damaged", "no data digest", "swapped", "other code"],
)
def test_integrity_comes_before_registration(trained: TrainResult, what: str) -> None:
    """What is not whole is refused, and the registry does not even hear of it."""
    client = MlflowClient()
    log_score(trained.model_id, 1.0)
    if what == "run not finished":
        client.set_terminated(trained.run_id, "KILLED")
    elif what == "other weights":
        client.set_tag(trained.run_id, "tunix_mlflow.weights_digest", "0" * 64)
    elif what == "no data digest":
        client.delete_tag(trained.run_id, "tunix_mlflow.dataset_digest")
    else:
        location = client.get_logged_model(trained.model_id).artifact_location
        folder = Path(location.removeprefix("file://"))
        if what == "damaged":
            shutil.rmtree(folder / "bundle" / "params" / "d")
        elif what == "swapped":
            other = train(config(seed="3")).model_id
            place = client.get_logged_model(other).artifact_location.removeprefix("file://")
            shutil.rmtree(folder / "bundle")
            shutil.copytree(Path(place) / "bundle", folder / "bundle")
        else:
            text = (folder / "MLmodel").read_text()
            (folder / "MLmodel").write_text(
                text.replace("tunix_mlflow.tracking.models.flavor", "evil")
            )
    with pytest.raises(IntegrityError):
        promote(trained.run_id, config=config())
    assert client.search_registered_models() == []


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


def test_equal_runs_have_equal_weights(trained: TrainResult) -> None:
    """The same configuration on the same data gives the same bits."""
    again = train(config())
    client = MlflowClient()
    digests = {
        client.get_run(r).data.tags["tunix_mlflow.weights_digest"]
        for r in (trained.run_id, again.run_id)
    }
    assert len(digests) == 1


def test_nothing_held_out_is_said(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset without a test split trains, without held-out figures."""
    path = write_traces(tmp_path / "all.jsonl", 20, split="train")
    datasets.ingest(path, "all-v1")
    trained = train(config(dataset="all-v1"))
    assert "nothing is held out" in capsys.readouterr().err
    assert not any(key.startswith("eval/") for key in trained.figures)


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


def test_only_the_whole_held_out_figure_counts(trained: TrainResult) -> None:
    """A part of the split, the training split, or another length of answer fool no gate."""
    for change in (
        {"evaluation__limit": "1"},
        {"evaluation__max_new_tokens": "3"},
        {"evaluation__split": "train", "data__train_split": "test"},
    ):
        evaluate(trained.run_id, config=config(**change))
    least = config(promotion__thresholds__exact_match="0")
    with pytest.raises(Refused, match="never evaluated"):
        promote(trained.run_id, config=least)
    evaluate(trained.run_id, config=config())
    assert promote(trained.run_id, config=least).changed


def test_equal_weights_alone_are_not_the_same_model(trained: TrainResult) -> None:
    """A model that answers at another length is another version, judged by its own figures."""
    log_score(trained.model_id, 0.9)
    promote(trained.run_id, config=config())
    other = train(config(evaluation__max_new_tokens="9"))
    with pytest.raises(Refused, match="version 2 is not promoted: it was never evaluated"):
        promote(other.run_id, config=config())
    assert champion() == "1"


@pytest.mark.parametrize("name", ["it's", "a/b", "", "x:y", "\n"])
def test_a_name_that_cannot_be_registered(trained: TrainResult, name: str) -> None:
    """Refused before the registry hears of it."""
    client = MlflowClient()
    model = registry.resolve(client, trained.run_id)
    with pytest.raises(ConfigError, match="cannot be registered"):
        gate.promote(client, model, name, thresholds={"exact_match": 0}, dataset=None)
    assert client.search_registered_models() == []


def test_a_split_that_is_not_there_is_not_taken_for_none(store: str, tmp_path: Path) -> None:
    """A typo in evaluation.split is said; holding out what is trained on is refused."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 30), "doubles-v1")
    with pytest.raises(DatasetError, match="no split 'tset' to hold out"):
        train(config(evaluation__split="tset"))
    with pytest.raises(ConfigError, match="nothing would be held out"):
        config(evaluation__split="train")


def test_an_offline_run_is_resumed_offline(
    store: str, doubles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration says where it is recorded; a launcher's run is left alone."""
    from tunix_mlflow.tracking.runs import lookup

    launched = MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    offline = config(tracking__offline="true")
    tags = {"tunix_mlflow.dataset_digest": datasets.get(doubles).digest}
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(stage="train", tracking=offline.tracking, tags=tags, report=print) as run,
    ):
        raise KeyboardInterrupt
    assert run.run_id != launched
    found = lookup.to_resume(run.run_id)
    assert found.config == offline
    assert set(found.environment) == {"NPROC", "XLA_FLAGS"}
