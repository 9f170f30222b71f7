"""Logged models: two digests, one delivery however often it is cut off, and what the gate reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import mlflow
import msgspec
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import write_traces
from tests.test_hub_tokenizer import files
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import DataConfig, ModelConfig, TrackingConfig
from tunix_mlflow.data import datasets
from tunix_mlflow.data.examples import Example, Message, to_answer
from tunix_mlflow.errors import IntegrityError, Refused, TrackingError
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models import decoder
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.text.hub_tokenizer import HubTokenizer
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.models import flavor, gate, registry
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.record.cursor import Cursor, update_cursor
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.sync import upload, worker
from tunix_mlflow.tracking.sync.delivery import Away, Delivery

QUIET = TrackingConfig(system_metrics=False)


def opened(stage: str, **more: Any) -> Run:
    return open_run(stage=stage, tracking=QUIET, report=print, **more)


def make_bundle(folder: Path, seed: int = 0) -> str:
    """Save a tiny model; the digest of its weights."""
    config = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=32)
    tokenizer = ByteTokenizer()
    graph, target = decoder.shape(config, tokenizer.vocab_size)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    params = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), target)
    bundles.save(bundles.Bundle(config, graph, params, tokenizer, 4), folder)
    return bundles.weights_digest(params)


def test_a_model_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """What decided the rendering of its training decides that of its prompts: day and thoughts."""
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = HubTokenizer(files(template), "the model")
    data = load_config(
        None, {"data.today": "2031-02-03", "data.reasoning": "inline", "data.packing": "false"}
    ).data
    config = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=32, vocab_size=280)
    params = decoder.init(config, 280, 0)
    made = bundles.Bundle(config, decoder.shape(config, 280)[0], params, tokenizer, 4, data=data)
    bundles.save(made, tmp_path / "bundle")
    again = bundles.load(tmp_path / "bundle")
    rendering = {"today": "2031-02-03", "reasoning": "inline"}
    assert bundles.describe(again)["rendering"] == rendering
    assert bundles.content_digest(again) == bundles.content_digest(made)
    assert bundles.content_digest(made) != bundles.content_digest(made._replace(data=DataConfig()))
    asked = (
        Message(role="user", content="30+1?"),
        Message(role="assistant", content="31", reasoning="one more"),
        Message(role="user", content="and 1?"),
    )
    ids = again._prompt(0, to_answer(asked), None).ids
    trained = tokenizer.encode_example(
        Example(messages=(*asked, Message(role="assistant", content="32"))), data
    )
    assert trained.findings == ()
    assert ids.tolist() == trained.ids[: len(ids)].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("03 Feb 2031<|im_start|>user")
    assert "<think>\none more\n</think>\n\n31" in text
    assert tokenizer.template_digest(data) != tokenizer.template_digest(
        msgspec.structs.replace(data, today=DataConfig().today)
    )


def log(run: Run, seed: int = 0, **more: Any) -> None:
    folder = run.folder / "models" / f"{seed}"
    digest = make_bundle(folder, seed)
    run.log_model(
        folder,
        name="doubles-v1 tiny, step 3",
        step=3,
        prompts=["Double 2"],
        tags={tags.WEIGHTS_DIGEST: digest},
        **more,
    )
    run.set_tags({tags.WEIGHTS_DIGEST: digest})


@pytest.fixture
def held_out(tmp_path: Path) -> TunixMlflowDataset:
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 60), "doubles-v1")
    return TunixMlflowDataset(datasets.get("doubles-v1"), "test")


@pytest.fixture
def trained(store: str, held_out: TunixMlflowDataset) -> str:
    """The id of a run that logged a model, with the figures that training measured."""
    with opened("train", tags={tags.DATASET_DIGEST: "d" * 64}) as run:
        run.log_metrics({"eval/exact_match": 0.9}, 3)
        log(run, metrics={"eval/exact_match": 0.9}, dataset=held_out)
    return run.run_id


def evaluated(model_id: str, value: float, dataset: TunixMlflowDataset) -> str:
    with opened("evaluate") as run:
        run.log_metrics({"eval/exact_match": value}, model_id=model_id, dataset=dataset)
    return run.run_id


def test_a_logged_model_has_a_name_two_digests_and_its_figures(trained: str) -> None:
    """The digests are of the files that MLflow has; the run's own point is there once."""
    client = MlflowClient()
    model = registry.resolve(client, trained)
    assert (model.name, str(model.status)) == ("doubles-v1 tiny, step 3", "READY")
    digests = gate.check_integrity(client, model)
    assert model.tags[tags.CONTENT_DIGEST] == digests.content
    assert model.tags[tags.PACKAGE_DIGEST] == digests.package
    (figure,) = model.metrics or []
    assert (figure.key, figure.value, figure.step) == ("eval/exact_match", 0.9, 3)
    assert (figure.dataset_name, figure.run_id) == ("doubles-v1/test", trained)
    assert len(client.get_metric_history(trained, "eval/exact_match")) == 1
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    assert list(loaded.predict(["Double 2"])) == ["text", "answer", "finish_reason", "error"]


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "it's", "50%"])
def test_a_name_that_mlflow_does_not_take_is_refused_at_once(store: str, name: str) -> None:
    """Not hours later by the server."""
    with (
        opened("train") as run,
        pytest.raises(TrackingError, match="a model cannot be called"),
    ):
        run.log_model(run.folder, name=name, step=1, prompts=[], tags={})


def test_equal_content_and_other_packages(store: str) -> None:
    """Two runs with the same weights: one content digest, and a package digest each."""
    for _ in range(2):
        with opened("train") as run:
            log(run)
    client = MlflowClient()
    models = client.search_logged_models([run.experiment_id or ""])
    assert len({model.tags[tags.CONTENT_DIGEST] for model in models}) == 1
    assert len({model.tags[tags.PACKAGE_DIGEST] for model in models}) == 2


def test_a_run_names_no_model_that_mlflow_does_not_have(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of before it was continued, while the new one waits or when MLflow refuses it."""
    seen = []
    with opened("train") as run:
        log(run)
    seen.append(run.model_id)

    def away(self: MlflowClient, *_: Any) -> None:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.05)
    with opened("train", run_id=run.run_id) as again:
        with monkeypatch.context() as patched:
            patched.setattr(MlflowClient, "create_logged_model", away)
            log(again, seed=1)
            seen.append(again.model_id)
        assert again.sync()
        seen.append(again.model_id)
        (again.folder / "models" / "1" / "manifest.json").unlink()
        again.log_model(
            again.folder / "models" / "1",
            name="gone",
            step=4,
            prompts=[],
            tags={tags.WEIGHTS_DIGEST: "0" * 64},
        )
        assert again.sync()
        seen.append(again.model_id)
    first, waiting, second, refused = seen
    assert waiting is refused is None
    assert None not in (first, second)
    assert first != second


def test_nor_the_one_before_what_an_earlier_process_left(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends before it could deliver its model; the run that goes on does not name the
    model before that one."""

    def away(self: Delivery) -> bool:
        raise Away("MLflow is away")

    with opened("train") as first:
        log(first)
    before = first.model_id
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(Delivery, "deliver_next", away)
        with opened("train", run_id=first.run_id) as left:
            log(left, seed=1)
        with opened("train", run_id=first.run_id) as later:
            assert later.model_id is None
    with opened("train", run_id=first.run_id) as later:
        assert later.sync()
        assert later.model_id not in (None, before)


CALLS = (
    *("create_logged_model", "set_logged_model_tags", "log_model_artifacts"),
    *("finalize_logged_model", "log_outputs", "log_batch"),
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("done", [True, False])
def test_a_delivery_that_was_cut_off_is_completed(
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    held_out: TunixMlflowDataset,
    call: str,
    done: bool,
) -> None:
    """Dead before any call or after it, the next process logs the one model; and once more."""
    real: Callable[..., Any] = getattr(MlflowClient, call)
    died: list[bool] = []

    def dying(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        metrics = kwargs.get("metrics") or []
        if died or (call == "log_batch" and not any(m.model_id for m in metrics)):
            return real(self, *args, **kwargs)
        died.append(True)
        if done:
            real(self, *args, **kwargs)
        raise ConnectionError("the process died")

    monkeypatch.setattr(worker, "RETRY_SECONDS", 0.05)
    with opened("train", tags={tags.DATASET_DIGEST: "d" * 64}) as run:
        run.sync()
        monkeypatch.setattr(MlflowClient, call, dying)
        log(run, metrics={"eval/exact_match": 0.9}, dataset=held_out)
    assert died
    client = MlflowClient()
    for _ in range(2):
        model = registry.resolve(client, run.run_id)
        assert gate.check_integrity(client, model).package == model.tags[tags.PACKAGE_DIGEST]
        assert len(model.metrics or []) == 1
        found = client.get_run(run.run_id)
        assert found.outputs is not None
        assert [o.model_id for o in found.outputs.model_outputs] == [model.model_id]
        assert len(client.search_logged_models([run.experiment_id or ""])) == 1
        update_cursor(run.folder, lambda _: Cursor())
        upload.catch_up(client, run.folder, print)


@pytest.mark.parametrize(
    ("victim", "named"),
    [("requirements.txt", "package digest"), ("MLmodel", "package digest"), ("bundle", "written")],
)
def test_a_changed_file_is_noticed(trained: str, victim: str, named: str) -> None:
    """Requirements and MLmodel too: they decide what is installed and run."""
    client = MlflowClient()
    model = registry.resolve(client, trained)
    path = Path(model.artifact_location.removeprefix("file://")) / victim
    if victim == "bundle":
        path = path / "bundle.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(IntegrityError, match=named):
        gate.promote(client, model, "doubles", thresholds={"exact_match": 0.0}, dataset=None)
    assert client.search_registered_models() == []


def test_a_run_does_not_judge_its_own_model(trained: str, held_out: TunixMlflowDataset) -> None:
    """Figures of training, and of other runs, never count; those of an evaluation do."""
    client = MlflowClient()
    model = registry.resolve(client, trained)
    with opened("bench") as other:
        other.log_metrics({"eval/exact_match": 1.0}, model_id=model.model_id, dataset=held_out)
    asked: dict[str, Any] = {"thresholds": {"exact_match": 0.8}, "dataset": "doubles-v1"}
    with pytest.raises(Refused, match="never evaluated"):
        gate.promote(client, registry.resolve(client, trained), "doubles", **asked)
    evaluated(model.model_id, 0.7, held_out)
    with pytest.raises(Refused, match=r"is 0.7000 on doubles-v1/test, required 0.8000"):
        gate.promote(client, registry.resolve(client, trained), "doubles", **asked)
    evaluated(model.model_id, 0.85, held_out)
    done = gate.promote(client, registry.resolve(client, trained), "doubles", **asked)
    assert (done.version, done.changed) == ("1", True)
    version = client.get_model_version("doubles", "1")
    assert version.tags[tags.CONTENT_DIGEST] == model.tags[tags.CONTENT_DIGEST]
    assert version.tags[tags.PACKAGE_DIGEST] == model.tags[tags.PACKAGE_DIGEST]
    again = gate.promote(client, registry.resolve(client, trained), "doubles", **asked)
    assert (again.version, again.changed) == ("1", False)
    with flavor.fetch_package("models:/doubles@champion") as package:
        assert bundles.load(flavor.bundle_folder(package))
