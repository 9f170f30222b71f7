"""A team's names: a key stands for one dataset, for everybody who has the shared root."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.conftest import tiny, write_traces
from tunix_mlflow import paths
from tunix_mlflow.config.load import load_config
from tunix_mlflow.data import datasets, shared_keys
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError, UnavailableError
from tunix_mlflow.pipelines.evaluate import evaluate
from tunix_mlflow.pipelines.train import train


@pytest.fixture(params=["a folder", "a URL"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a team, in each of the two ways that roots are reached."""
    place = str(tmp_path / "team")
    if request.param == "a URL":
        place = f"memory://{tmp_path.name}"
    monkeypatch.setenv(paths.SNAPSHOTS_VARIABLE, place)
    return place


def another(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Go on as a colleague, who has the shared root and nothing else."""
    monkeypatch.setenv(paths.HOME_VARIABLE, str(home))


def test_a_colleague_uses_a_dataset_by_its_key(
    root: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains and evaluates on it without the catalog, and cannot give its key to another one."""
    mine = datasets.ingest(write_traces(tmp_path / "a.jsonl", 60), "doubles-v1").manifest
    another(monkeypatch, tmp_path / "colleague")
    assert datasets.get("doubles-v1") == mine
    said: list[str] = []
    assert datasets.ready("doubles-v1", said.append).digest == mine.digest
    assert said == [f"dataset doubles-v1 is {mine.digest[:16]} of {root}"]
    small = load_config(None, tiny(dataset="doubles-v1", training__steps="2"))
    trained = train(small)
    assert evaluate(trained.run_id, config=small).dataset == "doubles-v1"
    leak = datasets.check_leakage(mine, "train", datasets.get("doubles-v1"), "train")
    assert len(leak.exact) == mine.splits["train"].count
    other = write_traces(tmp_path / "b.jsonl", 30)
    with pytest.raises(DatasetError, match=f"has digest {mine.digest[:16]} in .* and this one has"):
        datasets.ingest(other, "doubles-v1")
    datasets.ingest(other, "doubles-v2")
    again = datasets.ingest(write_traces(tmp_path / "c.jsonl", 60), "doubles-v1").manifest
    assert again.digest == mine.digest
    with pytest.raises(DatasetError, match="is not in"):
        datasets.get("absent-v1")


def test_races_for_a_key(root: str) -> None:
    """Of four who claim a key at once with different datasets one wins, and the rest are told."""

    def claimed(manifest: Manifest) -> str | None:
        barrier.wait()
        try:
            shared_keys.claim(manifest)
        except DatasetError as error:
            return str(error)
        return None

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        for race in range(25):
            key = f"race-v{race + 1}"
            rivals = [
                Manifest(key=key, digest=f"{n}" * 64, count=1, splits={}, request={}, stats={})
                for n in range(4)
            ]
            results = list(pool.map(claimed, rivals))
            (winner,) = [n for n, said in enumerate(results) if said is None]
            assert shared_keys.find(key) == str(winner) * 64
            for n, said in enumerate(results):
                if said is not None:
                    assert f"has digest {str(winner) * 16} in" in said
                    assert f"this one has {str(n) * 16}" in said


def test_without_a_shared_root(tmp_path: Path) -> None:
    """Nothing is claimed, and a key means what the catalog says."""
    manifest = datasets.ingest(write_traces(tmp_path / "a.jsonl", 9), "doubles-v1").manifest
    shared_keys.claim(msgspec.structs.replace(manifest, digest="0" * 64))
    assert shared_keys.find("doubles-v1") is None


def test_a_root_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing is stored; a damaged claim is named."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(paths.SNAPSHOTS_VARIABLE, str(tmp_path / "file"))
    path = write_traces(tmp_path / "a.jsonl", 9)
    with pytest.raises(UnavailableError, match="cannot claim doubles-v1"):
        datasets.ingest(path, "doubles-v1")
    monkeypatch.setenv(paths.SNAPSHOTS_VARIABLE, str(tmp_path / "team"))
    datasets.ingest(path, "doubles-v1")
    (tmp_path / "team" / "keys" / "doubles-v1.json").write_text("{")
    with pytest.raises(DatasetError, match=r"doubles-v1.json is damaged"):
        shared_keys.find("doubles-v1")
