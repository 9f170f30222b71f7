"""An evaluation set that was trained on is found, said, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny, write_traces
from tunix_mlflow import paths
from tunix_mlflow.data import datasets, leakage, snapshot
from tunix_mlflow.errors import DatasetError, IntegrityError, Refused

LONG = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"


def prompts(path: Path, *texts: str) -> Path:
    records = [{"prompt": t, "completion": "c", "split": "train"} for t in texts]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_grams_are_those_of_the_definition(texts: list[str]) -> None:
    """As many as a plain count of windows says, equal exactly where the words are equal."""
    import re

    hashes, owner = leakage.grams(pa.array(texts, pa.string()))
    expected: list[tuple[int, tuple[str, ...]]] = []
    for number, text in enumerate(texts):
        lowered = pc.utf8_lower(pa.scalar(text)).as_py()
        plain = pc.replace_substring_regex(lowered, r"[^\pL\pN]+", " ").as_py()
        words = re.split(" ", plain.strip(" ")) if plain.strip(" ") else []
        windows = [words[i : i + 8] for i in range(max(1, len(words) - 7))] if words else []
        expected += [(number, tuple(window)) for window in windows]
    assert owner.tolist() == [number for number, _ in expected]
    by_hash = dict(zip(hashes.tolist(), (w for _, w in expected), strict=True))
    assert len(by_hash) == len({w for _, w in expected})


def test_a_sketch_never_forgets() -> None:
    """All that went in is found; of what did not, few."""
    rng = np.random.default_rng(0)
    inside = rng.integers(0, 2**63, 5_000).astype(np.uint64)
    outside = rng.integers(0, 2**63, 50_000).astype(np.uint64)
    sketch = leakage.Sketch.of([inside[:1_000], inside[1_000:]])
    assert sketch.has(inside).all()
    assert sketch.has(outside).mean() < 0.02


def test_whole_prompts_and_parts_are_found(tmp_path: Path) -> None:
    """The same prompt is exact; its words in other clothes overlap; another does neither."""
    datasets.ingest(prompts(tmp_path / "a.jsonl", LONG, "2 + 2 = ?"), "trained-v1")
    asked = prompts(
        tmp_path / "b.jsonl", LONG, LONG.upper() + "!", "2 + 2 =", "what is the capital of France"
    )
    datasets.ingest(asked, "asked-v1")
    trained, evaluated = (datasets.ready(k, print) for k in ("trained-v1", "asked-v1"))
    found = datasets.check_leakage(trained, "train", evaluated, None)
    assert (len(found.exact), len(found.overlapping), found.prompts) == (1, 3, 4)
    shutil.rmtree(paths.root() / "cache", ignore_errors=True)
    paths.catalog_path().unlink()  # snapshots are enough
    by_digest = [datasets.ready(m.digest, print) for m in (trained, evaluated)]
    assert datasets.check_leakage(by_digest[0], "train", by_digest[1], None) == found
    with pytest.raises(DatasetError, match="no split 'validation'"):
        datasets.check_leakage(trained, "validation", evaluated, None)
    (paths.snapshot_dir(trained.digest) / "grams-train.npy").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="damaged"):
        datasets.check_leakage(trained, "train", evaluated, None)


def test_half_of_the_grams_is_the_threshold() -> None:
    """A prompt with just under half of its 8-grams in the training split does not count."""
    words = [f"w{n}" for n in range(27)]  # 20 8-grams
    prompt = " ".join(words)

    def overlapping(trained_words: int) -> list[str]:
        trained, _ = leakage.grams(pa.array([" ".join(words[:trained_words])]))
        sketch = leakage.Sketch.of([trained])
        return leakage.compare(
            set(), sketch, ["d"], ["p"], [prompt], lambda grams: np.isin(grams, trained)
        ).overlapping

    assert overlapping(8 + 8) == []  # 9 of 20
    assert overlapping(8 + 9) == ["d"]  # 10 of 20


def test_a_false_positive_of_the_filter_is_not_leakage() -> None:
    """A full filter finds everything; only what is really in the split counts."""
    sketch = leakage.Sketch(np.full(128, 255, np.uint8))
    trained, _ = leakage.grams(pa.array(["one two", LONG]))
    found = leakage.compare(
        set(),
        sketch,
        ["a", "b", "c"],
        ["p", "q", "r"],
        ["One, two!", "three four", LONG],
        lambda grams: np.isin(grams, trained),
    )
    assert found.overlapping == ["a", "c"]
    assert found.found == found.grams - 1


def test_training_on_an_evaluation_set_is_refused(store: str, tmp_path: Path) -> None:
    """Refused before a run is made; told otherwise, it trains, and the run has the figures."""
    import mlflow

    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.pipelines.train import train

    path = write_traces(tmp_path / "a.jsonl", 40, split="train")
    datasets.ingest(path, "doubles-v1", splits={"validation": 0.0})  # all is trained on
    datasets.ingest(write_traces(tmp_path / "b.jsonl", 4, start=2), "asked-v1")
    words = tiny(dataset="doubles-v1", data__evaluation_sets="[asked-v1]")
    with pytest.raises(Refused, match="leaks into doubles-v1/train: 4 prompts are trained on"):
        train(load_config(None, words))
    done = train(load_config(None, words | {"data.leakage": "record"}))
    tags = mlflow.get_run(done.run_id).data.tags
    assert tags["tunix_mlflow.leakage_exact.asked-v1"] == "4"


def test_a_dataset_in_mlflow(store: str, tmp_path: Path) -> None:
    """from_tunix logs schema, flat profile, digest and source; the source gives the rows back."""
    import mlflow
    import mlflow.data

    from_tunix_mlflow: Any = getattr(mlflow.data, "from_tunix_mlflow")  # noqa: B009  added by our plugin
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 40), "doubles-v1")
    manifest = datasets.get("doubles-v1")
    with mlflow.start_run() as run:
        for split in manifest.splits:
            mlflow.log_input(from_tunix_mlflow("doubles-v1", split=split), context=split)
    logged: Any = mlflow.get_run(run.info.run_id)
    inputs = logged.inputs.dataset_inputs
    assert {i.dataset.digest for i in inputs} == {s.digest[:32] for s in manifest.splits.values()}
    for one in inputs:
        split = one.dataset.name.partition("/")[2]
        profile = json.loads(one.dataset.profile)
        assert not any(isinstance(value, dict | list) for value in profile.values())
        assert profile["split_digest"] == manifest.splits[split].digest
        assert json.loads(one.dataset.schema)["mlflow_colspec"]
        rows = mlflow.data.get_source(one).load()
        assert rows == snapshot.read(manifest.digest, split)
    with pytest.raises(DatasetError, match="has the digest"):
        from_tunix_mlflow("doubles-v1", digest="0" * 8)
    with pytest.raises(DatasetError, match="no split"):
        from_tunix_mlflow("doubles-v1", split="nowhere")


def test_a_shared_snapshot_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """A colleague with the root trains by digest, without a catalog; a changed file is refused."""
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.pipelines.train import train

    root = tmp_path / "shared"
    monkeypatch.setenv("TUNIX_MLFLOW_SNAPSHOTS", f"simplecache::file://{root}")
    digest = datasets.ingest(write_traces(tmp_path / "a.jsonl", 40), "doubles-v1").manifest.digest
    assert (root / digest / "snapshot.json").is_file()
    monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / "colleague"))
    words = tiny(dataset=digest)
    done = train(load_config(None, words))
    assert done.manifest.key == "doubles-v1"
    assert not paths.catalog_path().exists()
    assert datasets.verify(digest).ok
    shutil.rmtree(tmp_path / "colleague")
    file = root / digest / "examples-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="does not match its digest"):
        datasets.ready(digest, print)
