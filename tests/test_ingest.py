"""Ingest: files of any kind and number become one dataset, and bad rows are named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import write_traces
from tunix_mlflow import paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, datasets, parsing, rows, sources
from tunix_mlflow.data.manifest import Selection
from tunix_mlflow.errors import DatasetError


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_one_digest_whatever_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSONL, Parquet with the nulls it invents, another order: all and random are equal."""
    records = [
        {
            "prompt": f"p{n}",
            "steps": [{"content": "s", "type": "t"}, {"content": "u"}],
            "answer": "a",
            "meta": {"n": n, "x": n / 4} if n % 2 else {"deep": {"a": n, "list": [1, 2]}},
        }
        for n in range(300)
    ]
    files = {
        "jsonl": lines(tmp_path / "a.jsonl", *records),
        "reversed": lines(tmp_path / "b.jsonl", *reversed(records)),
        "parquet": tmp_path / "c.parquet",
    }
    pq.write_table(pa.Table.from_pylist(records), files["parquet"])
    table = pq.read_table(files["parquet"]).to_pylist()
    assert table[0]["meta"]["x"] is None  # a null that was not in the data
    assert table[1]["meta"]["deep"] is None
    digests: dict[str, set[str]] = {"ingest": set(), "all": set(), "random": set()}
    for name, path in files.items():
        monkeypatch.setenv("TUNIX_MLFLOW_HOME", str(tmp_path / name))
        digests["ingest"].add(datasets.ingest(path, "x-v1").manifest.digest)
        digests["all"].add(datasets.build("y-v1", Selection(order="all")).manifest.digest)
        asked = Selection(order="random", seed=3, limit=50)
        digests["random"].add(datasets.build("z-v1", asked).manifest.digest)
        assert datasets.verify("x-v1").ok
    assert {name: len(found) for name, found in digests.items()} == dict.fromkeys(digests, 1)
    assert digests["ingest"] == digests["all"]


def test_a_datasets_folder(tmp_path: Path) -> None:
    """What Hugging Face `datasets` saved is read with its splits, without that package."""
    folder = tmp_path / "saved"
    for split, count in (("train", 8), ("validation", 3)):
        place = folder / split
        place.mkdir(parents=True)
        table = pa.table(
            {
                "question": [f"{split} {n}?" for n in range(count)],
                "answer": [f"s\n#### {n}" for n in range(count)],
            }
        )
        with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as out:
            out.write_table(table)
        named = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (place / "state.json").write_text(json.dumps(named))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    done = datasets.ingest(folder, "saved-v1")
    assert done.form == "question-answer"
    assert {n: s.count for n, s in done.manifest.splits.items()} == {"train": 8, "validation": 3}
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../../secret"]}))
    with pytest.raises(DatasetError, match="not allowed"):
        datasets.ingest(folder, "saved-v2")


def test_the_users_own_split_files(tmp_path: Path) -> None:
    """A folder's file names, SPLIT=PATH, and one file alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "dev", "test")):
        write_traces(folder / f"{name}.jsonl", 5, start=10 * n)
    splits = datasets.ingest(folder, "own-v1").manifest.splits
    assert {n: s.count for n, s in splits.items()} == {"train": 10, "validation": 5, "test": 5}
    named = [f"train={folder / 'dev.jsonl'}", f"held={folder / 'test.jsonl'}"]
    splits = datasets.ingest(named, "own-v2").manifest.splits
    assert {n: s.count for n, s in splits.items()} == {"train": 5, "held": 5}
    alone = datasets.ingest(write_traces(tmp_path / "train.jsonl", 200), "own-v3").manifest
    assert set(alone.splits) == {"train", "validation", "test"}


def test_limits_can_be_raised(tmp_path: Path) -> None:
    """What the default limits refuse, others take."""
    long = {"prompt": "p" * 60_000, "steps": [{"content": "s" * 25_000}], "answer": "a"}
    path = lines(tmp_path / "long.jsonl", long)
    with pytest.raises(DatasetError, match=r"long.jsonl:1: .*<= 50000 - at `\$\.prompt`"):
        datasets.ingest(path, "long-v1")
    limits = LimitsConfig(prompt_characters=100_000, step_characters=30_000)
    assert datasets.ingest(path, "long-v1", limits=limits).manifest.count == 1


def test_skip_bad_keeps_the_rest_and_the_reasons(tmp_path: Path) -> None:
    """Good rows are stored; every bad one stands in the rejects with place, reason and row; lines
    without any are passed over."""
    path = write_traces(tmp_path / "mixed.jsonl", 5)
    text = path.read_text().splitlines()
    text[1:1] = ["{", '{"prompt": "p"}', "", "\ud800".encode("utf-8", "surrogatepass").hex()]
    path.write_text("\n".join(text) + "\n")
    rejects = tmp_path / "rejects.jsonl"
    done = datasets.ingest(path, "mixed-v1", skip_bad=rejects)
    assert (done.manifest.count, done.rejected, done.rows) == (5, 3, 8)
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [r["where"] for r in found] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert all(r["reason"] for r in found)
    assert datasets.verify("mixed-v1").ok
    with pytest.raises(DatasetError, match=r":2: .*:3: .*:5: "):
        datasets.ingest(path, "mixed-v2")


def test_skip_bad_keeps_the_held_out_side_of_a_leak(tmp_path: Path) -> None:
    """A prompt in two splits: the training example goes, and is named."""
    line = {"prompt": "p", "steps": [{"content": "s"}], "answer": "a"}
    other = line | {"prompt": "q", "split": "train"}
    path = lines(tmp_path / "a.jsonl", line | {"split": "train"}, line | {"split": "test"}, other)
    with pytest.raises(DatasetError, match="same prompt is in the splits"):
        datasets.ingest(path, "a-v1")
    done = datasets.ingest(path, "a-v1", skip_bad=tmp_path / "r.jsonl")
    assert {n: s.count for n, s in done.manifest.splits.items()} == {"test": 1, "train": 1}
    (reject,) = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert reject["where"] == f"{path}:1"


def test_provenance_is_kept(tmp_path: Path) -> None:
    """The file's name, digest, size and rows; nothing of it is part of the dataset's identity."""
    path = write_traces(tmp_path / "a.jsonl", 5)
    datasets.ingest(path, "a-v1")
    (source,) = datasets.provenance("a-v1")
    assert source["sha256"] == canonical.digest(path.read_bytes())
    assert (source["file"], source["rows"], source["bytes"]) == (
        "a.jsonl",
        5,
        path.stat().st_size,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 120), max_size=3),
)
def test_spans_have_every_line_once(
    tmp_path_factory: Any, found: list[bytes], ended: bool, cuts: list[int]
) -> None:
    """However a file is cut, its spans hold the lines of the whole, in order."""
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    path.write_bytes(b"\n".join(found) + b"\n" * ended)
    source = sources.Source(path, "jsonl", None, None)
    whole = list(rows.lines(source, 5))
    places = [0, *sorted(cuts)]
    pieces = [
        line
        for start, end in zip(places, [*places[1:], None], strict=True)
        for line in rows.lines(source, 5, start, end)
    ]
    assert pieces == whole


def test_spans_are_read_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in two: the same digest, the bad lines by their numbers, progress to the end."""
    good = write_traces(tmp_path / "good.jsonl", 500)
    one = datasets.ingest(good, "one-v1").manifest
    monkeypatch.setattr(parsing, "SPAN_BYTES", good.stat().st_size // 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    told: list[tuple[int, int]] = []
    two = datasets.ingest(good, "two-v1", progress=lambda *a: told.append(a)).manifest
    assert (one.digest, one.splits, one.stats) == (two.digest, two.splits, two.stats)
    assert told[-1] == (good.stat().st_size, good.stat().st_size)
    order = [datasets.export(key, tmp_path / f"{key}.jsonl") for key in ("one-v1", "two-v1")]
    assert order == [500, 500]
    assert (tmp_path / "one-v1.jsonl").read_bytes() == (tmp_path / "two-v1.jsonl").read_bytes()

    rows = good.read_bytes().splitlines(keepends=True)
    rows[2], rows[470] = b'{"a"}\n', b'{"prompt": 1}\n'
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join(rows))
    with pytest.raises(DatasetError, match=r"bad.jsonl:3: .*bad.jsonl:471: .*Nothing was stored"):
        datasets.ingest(bad, "bad-v1")
    rejects = tmp_path / "rejects.jsonl"
    done = datasets.ingest(bad, "bad-v1", skip_bad=rejects)
    assert (done.rows, done.manifest.count, done.rejected) == (500, 498, 2)
    said = [json.loads(line)["where"] for line in rejects.read_text().splitlines()]
    assert said == [f"{bad}:3", f"{bad}:471"]
    bad.write_bytes(b'{"a"}\n' * 200 + b"".join(rows))
    with pytest.raises(DatasetError, match=r"bad.jsonl:1: .* more so far\. Nothing was stored"):
        datasets.ingest(bad, "worse-v1")
    assert not list(paths.temporary_dir().glob(".scratch-*"))
