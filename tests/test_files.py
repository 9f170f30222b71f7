"""Files of every kind that people have are read as their author would expect."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.files import hostile, make
from tunix_mlflow.cli.dataset_content import readable
from tunix_mlflow.data import datasets, snapshot
from tunix_mlflow.errors import DatasetError

HOSTILE = hostile.files()
FILES = {file.name: file for file in make.files()}


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, tmp_path: Path) -> None:
    """It is recognised, all of its rows are kept, and the first says what it says; or one line
    says what is wrong, and nothing is stored."""
    file = FILES[name]
    path = tmp_path / name
    path.write_bytes(file.data)
    if file.form is None:
        with pytest.raises(DatasetError, match=file.why) as caught:
            datasets.ingest(path, "one-v1", **file.options)
        assert "\n" not in str(caught.value)
        with pytest.raises(DatasetError, match="is not in"):
            datasets.get("one-v1")
        return
    done = datasets.ingest(path, "one-v1", **file.options)
    assert (done.form, done.manifest.count, done.rejected) == (file.form, file.examples, 0)
    assert done.rows == file.examples
    shown = readable(datasets.first_example("one-v1"))
    for text in file.says:
        assert text in shown, shown
    assert datasets.verify("one-v1").ok


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name: str, tmp_path: Path) -> None:
    """It is refused in one line that names it, in bounded memory, and nothing is stored."""
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=name) as caught:
            datasets.ingest(path, "one-v1")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64_000_000
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3_000
    with pytest.raises(DatasetError, match="is not in"):
        datasets.get("one-v1")


def test_the_same_rows_are_the_same_dataset(tmp_path: Path) -> None:
    """Whatever kind of file they stand in."""
    make.write(tmp_path)
    digests = {
        name: datasets.ingest(tmp_path / name, f"d{n}-v1", **file.options).manifest.digest
        for n, (name, file) in enumerate(FILES.items())
        if name.startswith(("pairs", "chat", "traces"))
    }
    for stem in ("pairs", "chat", "traces"):
        same = {digest for name, digest in digests.items() if name.startswith(stem)}
        assert len(same) == 1, stem


def test_the_page_is_that_of_the_files() -> None:
    """docs/files.md lists every file, and what becomes of it."""
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert page == make.page()
    taken = sum(file.form is not None for file in FILES.values())
    assert (taken, len(FILES)) >= (52, 60)


def test_long_texts_that_are_not_used_are_named(tmp_path: Path) -> None:
    """With their size; numbers, names and short texts are not."""
    path = tmp_path / "extra-columns.jsonl"
    path.write_bytes(FILES[path.name].data)
    assert datasets.ingest(path, "one-v1").unused == {"explanation": 61}


def test_preferences_are_kept_and_not_trained_on(tmp_path: Path) -> None:
    """They are exported as they came, in pairs and labelled; other forms and training refuse."""
    for name in ("chosen-rejected.jsonl", "preference-chats.jsonl", "kto.jsonl"):
        path = tmp_path / name
        path.write_bytes(FILES[name].data)
        key = f"{path.stem}-v1"
        datasets.ingest(path, key)
        out = tmp_path / f"out-{name}"
        datasets.export(key, out, "preference")
        again = datasets.ingest(out, f"{path.stem}-v2").manifest
        first, second = (snapshot.read(d) for d in (datasets.get(key).digest, again.digest))
        assert {e.rejected for e in first} == {e.rejected for e in second}
        assert {e.label for e in first} == {e.label for e in second}
        with pytest.raises(DatasetError, match="use --format preference"):
            datasets.export(key, tmp_path / "x.jsonl", "messages")
