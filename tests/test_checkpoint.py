"""Checkpoints: only what the manifest vouches for is ever restored."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunix_mlflow.errors import CheckpointError, IntegrityError
from tunix_mlflow.models import arrays
from tunix_mlflow.training import checkpoint
from tunix_mlflow.training.checkpoint import Checkpoints, Retention

IDENTITY = {"dataset_digest": "d" * 64, "nproc": "2"}


def state(value: float) -> dict[str, jax.Array]:
    rng = np.random.default_rng(int(value))
    return {
        "a": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
        "b": {"c": jnp.int32(value)},  # type: ignore[dict-item]
    }


def manager(folder: Path, **identity: str) -> Checkpoints:
    return Checkpoints(folder, IDENTITY | identity, retention=Retention(3))


def saved(folder: Path, *numbers: int) -> Path:
    with_all = manager(folder)
    for number in numbers:
        with_all.save(number, state(number))
    with_all.close()
    return folder


def same(a: object, b: object) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def restore(folder: Path, **identity: str) -> tuple[int, object] | None:
    messages: list[str] = []
    return manager(folder, **identity).restore_latest(state(0), messages.append)


def test_the_newest_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """And older ones go, once the next is safe."""
    saved(tmp_path / "c", 1, 2, 3, 4, 5)
    found = restore(tmp_path / "c")
    assert found is not None
    assert found[0] == 5
    assert same(found[1], state(5))
    assert [int(p.name) for p in checkpoint.steps(tmp_path / "c")] == [3, 4, 5]


def test_no_flipped_bit_is_ever_restored(tmp_path: Path) -> None:
    """Every file of a checkpoint, one bit each: noticed, put aside, and the one before used."""
    names = [
        p.relative_to(tmp_path / "0" / "00000002")
        for p in saved(tmp_path / "0", 1, 2).rglob("00000002/**/*")
        if p.is_file()
    ]
    assert len(names) > 3
    for number, name in enumerate(names, start=1):
        folder = saved(tmp_path / str(number), 1, 2)
        try:
            victim = next((folder / "00000002").rglob(name.name))
        except StopIteration:  # Orbax gives its data files random names
            others = (folder / "00000002" / name.parent).glob("*")
            victim = next(p for p in others if p.is_file())
        data = bytearray(victim.read_bytes())
        if not data:
            continue
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        messages: list[str] = []
        found = manager(folder).restore_latest(state(0), messages.append)
        assert found is not None, name
        assert found[0] == 1, name
        assert same(found[1], state(1))
        assert len(messages) == 1
        assert (folder / checkpoint.QUARANTINE / "00000002.0").is_dir()


def test_no_flipped_bit_of_the_manifest_is_believed(tmp_path: Path) -> None:
    """The manifest vouches for itself: one bit of any byte, and it counts no more."""
    folder = saved(tmp_path, 1) / "00000001"
    good = (folder / arrays.MANIFEST).read_bytes()
    content = {k: v for k, v in json.loads(good).items() if k != "digest"}
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / arrays.MANIFEST).write_bytes(bad)
        try:
            assert arrays.check(folder) == content  # white space carries nothing
        except IntegrityError:
            continue


@pytest.mark.parametrize("damage", ["delete", "truncate", "add", "no manifest"])
def test_other_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    """A file gone, cut or added; and a checkpoint that was never sealed does not exist."""
    folder = saved(tmp_path, 1, 2)
    newest = folder / "00000002"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "add":
        (newest / "state" / "extra").write_text("x")
    else:
        (newest / arrays.MANIFEST).unlink()
    found = restore(folder)
    assert found is not None
    assert found[0] == 1


def test_nothing_to_restore(tmp_path: Path) -> None:
    """An empty folder, and stray folders with numeric names, are no checkpoints."""
    assert restore(tmp_path / "absent") is None
    (tmp_path / "00000011").mkdir()
    assert restore(tmp_path) is None


def test_saving_again_over_a_torn_one(tmp_path: Path) -> None:
    """What a killed save left at the same step is replaced."""
    (tmp_path / "00000003" / "state").mkdir(parents=True)
    (tmp_path / "00000003" / "state" / "junk").write_text("torn")
    found = restore(saved(tmp_path, 3))
    assert found is not None
    assert same(found[1], state(3))


def test_other_data_is_refused(tmp_path: Path) -> None:
    """The difference is named; another thread count alone is no refusal."""
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another dataset: dddd"):
        restore(tmp_path, dataset_digest="e" * 64)
    assert restore(tmp_path, nproc="8") is not None


def test_another_structure_is_refused(tmp_path: Path) -> None:
    """Names, shapes and types must be the same; Orbax alone would cast in silence."""
    arrays.write(tmp_path / "x", {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    for target in (
        {"a": jnp.zeros((2, 3))},
        {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(1)},
    ):
        with pytest.raises(IntegrityError, match="does not fit"):
            arrays.read(tmp_path / "x", target)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The message names the path and the free space."""
    (tmp_path / "c").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*MiB are free"):
        manager(tmp_path / "c").save(1, state(1))


def test_manifest_is_json(tmp_path: Path) -> None:
    """Step, identity and every file with size and sha256."""
    saved(tmp_path, 7)
    manifest = json.loads((tmp_path / "00000007" / arrays.MANIFEST).read_text())
    assert manifest["step"] == 7
    assert manifest["identity"] == IDENTITY
    assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())
