"""Datasets: what is selected, how it is split, and how it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.conftest import write_traces
from tunix_mlflow import paths
from tunix_mlflow.data import datasets, snapshot
from tunix_mlflow.data.catalog import read
from tunix_mlflow.data.manifest import Selection
from tunix_mlflow.errors import DatasetError, Refused
from tunix_mlflow.files import sha256_file


@pytest.fixture
def doubles(tmp_path: Path) -> str:
    """A dataset of 40 traces."""
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 40), "doubles-v1")
    return "doubles-v1"


def tamper(*statements: str) -> None:
    con = duckdb.connect(str(paths.catalog_path()))
    for statement in statements:
        con.execute(statement)
    con.close()


def test_export_reads_back_to_the_same_digest(doubles: str, tmp_path: Path) -> None:
    """export and ingest are inverse: splits aside, which the file now states itself."""
    manifest = datasets.seed("column-addition-v1", num_traces=300, name="sums-v1").manifest
    assert datasets.export("sums-v1", tmp_path / "out.jsonl") == 300
    again = datasets.ingest(tmp_path / "out.jsonl", "again-v1").manifest
    assert again.digest == manifest.digest
    assert again.splits == manifest.splits


def test_build_filters_limits_and_selects(doubles: str) -> None:
    """Filters match value and type; latest is newest first; random is a function of its seed."""
    even = datasets.build("even-v1", Selection(filters={"parity": "even"})).manifest
    assert even.count == 20
    one = datasets.build("one-v1", Selection(filters={"n": 7})).manifest
    assert one.count == 1
    with pytest.raises(DatasetError, match="no example"):
        datasets.build("none-v1", Selection(filters={"n": "7"}))
    latest = datasets.build("latest-v1", Selection(limit=3)).manifest
    prompts = {e.prompt for e in snapshot.read(latest.digest)}
    assert prompts == {"Double 37", "Double 38", "Double 39"}

    def chosen(key: str, seed: int) -> str:
        return datasets.build(key, Selection(order="random", seed=seed, limit=10)).manifest.digest

    assert chosen("r1-v1", 1) == chosen("r1-v2", 1) != chosen("r2-v1", 2)


@pytest.mark.parametrize("key", ["a'b", 'a"b', "", "$.n", "a.b", "x" * 200, "n\x00", "é"])
def test_a_filter_key_is_a_plain_word(doubles: str, key: str) -> None:
    """Nothing but a word reaches the JSON path."""
    with pytest.raises(DatasetError, match="filter key"):
        datasets.build("x-v1", Selection(filters={key: "1"}))


@pytest.mark.parametrize("value", ["' OR 1=1 --", "\\", '"', "%", "\ud800", 2**60, None, [1]])
def test_a_filter_value_is_only_compared(doubles: str, value: object) -> None:
    """No value is anything but a value."""
    with pytest.raises(DatasetError, match=r"no example|filter n"):
        datasets.build("x-v1", Selection(filters={"n": value}))


def test_export_leaves_nothing_half_written(doubles: str, tmp_path: Path) -> None:
    """A folder, or a place that is not there, is one line."""
    (tmp_path / "out.jsonl").mkdir()
    for target in (tmp_path / "out.jsonl", tmp_path / "absent" / "x.jsonl"):
        with pytest.raises(DatasetError, match="cannot write"):
            datasets.export(doubles, target)
    assert not list(tmp_path.glob(".*"))


def test_a_prompt_keeps_to_one_split(tmp_path: Path) -> None:
    """Own splits that disagree are refused by id; an example without one joins its prompt's."""
    path = tmp_path / "leak.jsonl"
    line = {"prompt": "p", "steps": [{"content": "s"}], "answer": "a"}
    lines = [line | {"split": "train"}, line | {"split": "test", "answer": "b"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(DatasetError, match="same prompt is in the splits 'test' and 'train'"):
        datasets.ingest(path, "leak-v1")
    lines = [line, line | {"split": "test", "answer": "b"}, line | {"prompt": "other"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    splits = datasets.ingest(path, "joined-v1").manifest.splits
    assert {name: split.count for name, split in splits.items()} == {"test": 2, "train": 1}


def test_filters_compare_by_type_and_operator(doubles: str) -> None:
    """Ranges, lists, negations and combinations; a key that is absent meets a negation."""

    def count(**filters: object) -> int:
        key = f"f-v{len(read.listing(paths.catalog_path()))}"
        return datasets.build(key, Selection(filters=filters)).manifest.count

    assert count(n={"ge": 10, "lt": 13}) == 3
    assert count(n={"in": [1, 2, 99]}, parity="odd") == 1
    assert count(n={"not_in": list(range(38))}) == 2
    assert count(parity={"ne": "even"}) == 20
    assert count(nowhere={"ne": "x"}) == 40
    assert count(n={"gt": 36.5}) == 3
    bad: dict[str, Any]
    for bad in ({"like": "a"}, {"in": []}, {"in": "x"}, {"lt": True}, {"eq": None}):
        with pytest.raises(DatasetError, match="filter n"):
            count(n=bad)


def test_named_fractions_and_parents(tmp_path: Path) -> None:
    """Splits by prompt hash nest as they grow; a child knows its parent, and keeps its splits."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 400), "base-v1")
    shares = {"test": 0.2, "validation": 0.1}
    parent = datasets.build("parent-v1", Selection(order="all", splits=shares)).manifest
    assert set(parent.splits) == {"train", "validation", "test"}
    assert 50 < parent.splits["test"].count < 110
    asked = Selection(parent="parent-v1", filters={"parity": "even"}, splits=shares)
    child = datasets.build("child-v1", asked).manifest
    assert child.parent == f"parent-v1@{parent.digest}"
    assert child.count == 200
    assert datasets.verify("child-v1").ok
    for bad in ({"test": 1.5}, {"test": 0.6, "dev": 0.6}, {"Test": 0.1}, {"test": float("nan")}):
        with pytest.raises(DatasetError, match="split"):
            datasets.build("bad-v1", Selection(splits=bad))


def split_of(key: str) -> dict[str, str]:
    """Prompt -> the split it is in."""
    splits = datasets.get(key).splits
    found = snapshot.read_splits(datasets.get(key).digest, list(splits))
    return {e.prompt: name for name, part in found.items() for e in part}


def test_data_without_splits_gets_three(tmp_path: Path) -> None:
    """By ingest, and a prompt keeps its split when the dataset grows."""
    small = datasets.ingest(write_traces(tmp_path / "a.jsonl", 300), "small-v1").manifest
    assert 10 < small.splits["validation"].count < 60
    assert 10 < small.splits["test"].count < 60
    assert "validation_from_train" not in small.stats
    datasets.ingest(write_traces(tmp_path / "b.jsonl", 600), "large-v1")
    assert split_of("small-v1").items() <= split_of("large-v1").items()


def test_validation_is_taken_from_train_and_said(tmp_path: Path) -> None:
    """Where the data has splits but no validation: a tenth of train by prompt, never of test."""

    def ingest(key: str, count: int, **more: Any) -> datasets.Ingested:
        parts = [
            f"{name}={write_traces(tmp_path / f'{name}.jsonl', n, start=start)}"
            for name, n, start in (("train", count, 0), ("test", 50, 9_000))
        ]
        return datasets.ingest(parts, key, **more)

    done = ingest("own-v1", 300)
    counts = {name: split.count for name, split in done.manifest.splits.items()}
    assert counts["test"] == 50
    assert counts["train"] + counts["validation"] == 300
    assert 10 < counts["validation"] < 60
    assert done.validation_from_train == counts["validation"]
    assert datasets.verify("own-v1").ok
    ingest("own-v2", 600)
    assert split_of("own-v1").items() <= split_of("own-v2").items()
    none = ingest("own-v3", 300, splits={"validation": 0.0})
    assert set(none.manifest.splits) == {"train", "test"}
    only_train = datasets.ingest(write_traces(tmp_path / "a.jsonl", 99, split="train"), "t-v1")
    assert set(only_train.manifest.splits) == {"train", "validation"}
    tiny = datasets.ingest(write_traces(tmp_path / "b.jsonl", 1, split="train"), "tiny-v1")
    assert set(tiny.manifest.splits) == {"train"}
    # An export has the splits; without its validation, train is not where the hash says.
    datasets.ingest(write_traces(tmp_path / "c.jsonl", 300), "three-v1")
    datasets.export("three-v1", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(r) + "\n" for r in rows if r["split"] != "validation")
    (tmp_path / "two.jsonl").write_text(kept)
    assert datasets.ingest(tmp_path / "two.jsonl", "two-v1").validation_from_train > 10


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 40])
def test_a_few_prompts_are_held_out_of_a_small_dataset(count: int, tmp_path: Path) -> None:
    """One for validation and one for test, if train keeps one; with shares of one's own not."""
    path = write_traces(tmp_path / "few.jsonl", count)
    manifest = datasets.ingest(path, "few-v1").manifest
    counts = {name: split.count for name, split in manifest.splits.items()}
    held_out = [counts.get(name, 0) for name in ("test", "validation")]
    assert counts["train"] >= 1
    assert min(held_out) >= 1 if count >= 3 else sum(held_out) == count - 1
    assert sum(counts.values()) == count
    assert datasets.verify("few-v1").ok
    own = datasets.ingest(path, "own-v1", splits={"test": 0.0}).manifest
    assert set(own.splits) == {"train"}


def test_a_child_keeps_the_splits_of_its_parent(tmp_path: Path) -> None:
    """Whatever shares it asks for: no prompt of the parent's test is trained on."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 200), "p-v1", splits={"test": 0.5})
    datasets.build("c-v1", Selection(parent="p-v1", filters={"parity": "odd"}))
    parent, child = split_of("p-v1"), split_of("c-v1")
    assert len(child) == 100
    assert {p for p, s in child.items() if s == "test"} == {p for p in child if parent[p] == "test"}
    assert {"train", "validation", "test"} == set(child.values())
    assert datasets.verify("c-v1").ok
    tamper("UPDATE members SET split = 'test' WHERE key = 'c-v1' AND split = 'validation'")
    shutil.rmtree(paths.snapshot_dir(datasets.get("c-v1").digest))
    assert len(datasets.verify("c-v1").split_drift) == list(child.values()).count("validation")


def test_load_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A key, a digest, a file, files by split; verified, with a snapshot, and nothing printed."""
    seeded = datasets.load_dataset("golden-v1")
    assert datasets.load_dataset(seeded.digest) == seeded
    path = write_traces(tmp_path / "a.jsonl", 40)
    one = datasets.load_dataset(path, key="mine-v1", form="trace")
    assert (one.key, one.count) == ("mine-v1", 40)
    assert datasets.load_dataset(str(path), key="mine-v1", form="trace") == one
    two = datasets.load_dataset([f"train={path}", f"test={tmp_path}/b.jsonl"][:1], key="mine-v2")
    assert "train" in two.splits
    assert len(snapshot.read(one.digest)) == 40
    for bad in (lambda: datasets.load_dataset(path), lambda: datasets.load_dataset("nowhere-v1")):
        with pytest.raises(DatasetError):
            bad()
    with pytest.raises(DatasetError, match="form need key"):
        datasets.load_dataset("golden-v1", form="trace")
    tamper("DELETE FROM examples WHERE canonical LIKE '%Double 7\"%'")
    with pytest.raises(Refused, match="missing"):
        datasets.load_dataset("mine-v1")
    assert capfd.readouterr() == ("", "")


def test_a_snapshot_is_hashed_once(doubles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying, reading and comparing hash each file and each example once; a change is seen."""
    digest = datasets.get(doubles).digest
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr(snapshot, "sha256_file", counting)
    snapshot._hashed.clear()  # as in a process that did not write it
    snapshot._verified.clear()
    manifest = datasets.ready(doubles)
    both = snapshot.read_splits(digest, ["train", "validation", "absent"])
    assert both == {
        "train": snapshot.read(digest, "train"),
        "validation": snapshot.read(digest, "validation"),
        "absent": [],
    }
    datasets.check_leakage(manifest, "train", manifest, "test")
    datasets.ready(digest)
    assert len(hashed) == len(set(hashed)) > 0
    path = paths.snapshot_dir(digest) / "examples-00000.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert datasets.verify(doubles).notes == [f"snapshot drift: {path.name}"]


def test_diff_pairs_what_shares_a_prompt(tmp_path: Path) -> None:
    """Added, removed, changed and moved, each by digest."""
    path = write_traces(tmp_path / "a.jsonl", 6, split="train")
    datasets.ingest(path, "a-v1")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["answer"] = "another"
    records[1]["prompt"] = "a new question"
    path.write_text("".join(json.dumps(r) + "\n" for r in records[:5]))
    datasets.ingest(path, "a-v2")
    found = datasets.diff("a-v1", "a-v2")
    assert [len(kind) for kind in found] == [1, 2, 1, 0]
    assert datasets.diff("a-v1", "a-v1") == ([], [], [], [])
