"""Checkpoints: only what the manifest vouches for is ever restored."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import test_training as training
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import CheckpointsConfig
from tunix_mlflow.errors import CheckpointError, ConfigError, IntegrityError, UnavailableError
from tunix_mlflow.models import arrays
from tunix_mlflow.training import checkpoint
from tunix_mlflow.training.checkpoint import (
    Checkpoints,
    Retention,
    sealed_checkpoints,
    to_delete,
)
from tunix_mlflow.training.state import TrainState

IDENTITY = {"dataset_digest": "d" * 64, "nproc": "2"}


def state(value: float) -> dict[str, Any]:
    rng = np.random.default_rng(int(value))
    return {
        "a": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
        "b": {"c": jnp.int32(value)},
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
    assert [int(p.name) for p in sealed_checkpoints(tmp_path / "c")] == [3, 4, 5]


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
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / arrays.MANIFEST).write_bytes(bad)
        with pytest.raises(IntegrityError):
            arrays.check(folder)
    (folder / arrays.MANIFEST).write_bytes(good)
    arrays.check(folder)


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


def test_other_numerics_are_refused(tmp_path: Path) -> None:
    """Resuming names both versions and the way out; a fork, which asks for no identity, restores
    the state as it was saved."""
    kept = manager(tmp_path, numerics="1")
    kept.save(1, state(1))
    kept.close()
    message = "made by version 1 of our numerics, and this is version 2: .*--fork"
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, numerics="2")
    fork = Checkpoints(tmp_path, {}, retention=Retention(1))
    found = fork.restore_latest(state(0), pytest.fail)
    assert found is not None
    assert found[0] == 1
    assert same(found[1], state(1))
    assert same(fork.restore(1, state(0)), state(1))
    fork.close()


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
    with pytest.raises(UnavailableError, match=r"cannot write the checkpoint .*MiB are free"):
        manager(tmp_path / "c").save(1, state(1))


def test_manifest_is_json(tmp_path: Path) -> None:
    """Step, identity and every file with size and sha256."""
    saved(tmp_path, 7)
    manifest = json.loads((tmp_path / "00000007" / arrays.MANIFEST).read_text())
    assert manifest["step"] == 7
    assert manifest["identity"] == IDENTITY
    assert all(len(entry["sha256"]) == 64 for entry in manifest["files"].values())


TIES = st.sampled_from([-math.inf, -1.0, 0.0, 0.0, 2.0, math.inf, math.nan])
SCORES = TIES | st.floats()
FOUND = st.dictionaries(
    st.integers(0, 40),
    st.fixed_dictionaries({}, optional={"validation/loss": SCORES, "other": SCORES}),
    max_size=12,
).map(lambda found: list(found.items()))
RETENTIONS = st.builds(
    Retention,
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from(["validation/loss", "other"]),
    st.sampled_from(["min", "max"]),
    st.sampled_from([0, 1, 5, 20]),
)


@settings(deadline=None)
@given(FOUND, RETENTIONS)
def test_what_may_go(found: list[tuple[int, Mapping[str, float]]], retention: Retention) -> None:
    """One goes exactly if enough are newer, enough are better, and it is no multiple; and doing it
    twice changes nothing."""

    def better(step: int, value: float) -> int:
        """How many are better than it, or as good and newer."""
        count = 0
        for other, metrics in found:
            rival = metrics.get(retention.metric, math.nan)
            ahead = rival < value if retention.mode == "min" else rival > value
            count += ahead or (rival == value and other > step)
        return count

    expected = []
    for step, metrics in sorted(found, key=lambda one: one[0]):
        value = metrics.get(retention.metric, math.nan)
        newer = sum(other > step for other, _ in found)
        last = newer < max(1, retention.keep_last)
        best = not math.isnan(value) and better(step, value) < retention.keep_best
        multiple = retention.every_steps > 0 and step % retention.every_steps == 0
        if not (last or best or multiple):
            expected.append(step)
    assert to_delete(found, retention) == expected
    assert to_delete(found[::-1], retention) == expected
    assert to_delete([one for one in found if one[0] not in expected], retention) == []


def test_the_best_stay_and_the_order_is_safe(tmp_path: Path) -> None:
    """The last, the best and the multiples; one goes only after the next was sealed."""
    events: list[tuple[str, int]] = []
    kept = Checkpoints(
        tmp_path,
        IDENTITY,
        retention=Retention(1, keep_best=1, every_steps=4),
        on_sealed=lambda _, step: events.append(("sealed", step)),
        on_removed=lambda step: events.append(("removed", step)),
    )
    losses = {1: 3.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: 1.5, 6: None}
    for step, loss in losses.items():
        kept.save(step, state(step), None if loss is None else {"validation/loss": loss})
    kept.close()
    assert [int(p.name) for p in sealed_checkpoints(tmp_path)] == [2, 4, 6]
    assert [step for what, step in events if what == "sealed"] == [1, 2, 3, 4, 5, 6]
    removed = {step: events.index((what, step)) for what, step in events if what == "removed"}
    assert set(removed) == {1, 3, 5}
    assert all(removed[step] > events.index(("sealed", step + 1)) for step in removed)


def test_the_state_may_be_given_away(tmp_path: Path) -> None:
    """What is saved, and its digest, is the state at the time of the save, though its buffers
    are donated to the updates after it.

    JAX copies a donated buffer instead of reusing it while a numpy view of it exists, which Orbax's
    thread may hold for a moment: what is donated for certain here is another state.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: array + 1 for name, array in values.items()}

    def initial() -> dict[str, jax.Array]:
        return {"a": jnp.zeros((1000, 500)), "b": jnp.zeros((5,), jnp.bfloat16)}

    other = initial()
    update(other)
    assert other["a"].is_deleted()
    assert other["b"].is_deleted()
    values = initial()
    kept = manager(tmp_path)
    kept.save(1, values)
    for _ in range(5):
        values = update(values)
    kept.wait()
    zeros = jax.tree.map(jnp.zeros_like, values)
    assert same(kept.restore(1, values), zeros)
    manifest = arrays.content(tmp_path / "00000001")
    assert manifest["state_digest"] == arrays.digest(zeros) != arrays.digest(values)
    kept.close()


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros((2, 3), np.float32), "c": np.ones(2, np.int32)},
        {"a": np.zeros((3, 2), np.float32), "b": np.ones(2, np.int32)},
        {"a": np.zeros((2, 3), np.int32), "b": np.ones(2, np.int32)},
        {"a": np.zeros((2, 3), np.float32), "b": np.array([1, 2], np.int32)},
        {"a": -np.zeros((2, 3), np.float32), "b": np.ones(2, np.int32)},
    ],
)
def test_a_digest_covers(other: dict[str, np.ndarray]) -> None:
    """Names, shapes, types and bytes, to the sign of a zero; not the order of keys, nor whether
    numpy or jax holds them."""
    one = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.int32)}
    assert arrays.digest(other) != arrays.digest(one)
    again = {"b": jnp.ones(2, jnp.int32), "a": jnp.zeros((2, 3), jnp.float32)}
    assert arrays.digest(again) == arrays.digest(one)


def test_one_step_of_many(tmp_path: Path) -> None:
    """Any that is sealed; one that is not there is an error that names those that are."""
    kept = manager(saved(tmp_path, 1, 2, 3))
    assert same(kept.restore(2, state(0)), state(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 in .*: 1, 2, 3"):
        kept.restore(9, state(0))
    with pytest.raises(CheckpointError, match="no checkpoint of step 9"):
        kept.rewind(9)
    kept.close()


def test_going_back(tmp_path: Path) -> None:
    """Later ones are put aside, twice if need be, and the same steps are saved anew."""
    for number in range(2):
        kept = manager(saved(tmp_path, 1, 2, 3))
        kept.rewind(1)
        kept.save(2, state(20 + number))
        kept.wait()
        found = kept.restore_latest(state(0), pytest.fail)
        assert found is not None
        assert found[0] == 2
        assert same(found[1], state(20 + number))
        kept.close()
    names = {p.name for p in (tmp_path / checkpoint.SUPERSEDED).iterdir()}
    assert names == {"00000002.0", "00000003.0", "00000002.1", "00000003.1"}


def resealed(folder: Path, **changes: object) -> None:
    """Write another manifest that vouches for itself."""
    arrays.seal(folder, {**arrays.content(folder), **changes})


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    """Files that agree with the manifest are not enough."""
    folder = saved(tmp_path, 1) / "00000001"
    resealed(folder, state_digest="0" * 64)
    with pytest.raises(IntegrityError, match="does not hold the state that was saved"):
        restore(tmp_path)


def test_an_old_damaged_manifest_stops_nothing(tmp_path: Path) -> None:
    """Saving goes on beside it; it is none of the best, and goes when its time comes."""
    folder = saved(tmp_path, 1, 2, 3)
    (folder / "00000001" / arrays.MANIFEST).write_text("{}")
    saved(folder, 4)
    assert [int(p.name) for p in sealed_checkpoints(folder)] == [2, 3, 4]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    """Of a killed deletion, save or Orbax; what is sealed, put aside or not ours stays."""
    folder = saved(tmp_path / "c", 1, 2)
    for name in (".deleting-00000001", "00000009", "3.orbax-checkpoint-tmp", "quarantine"):
        (folder / name / "inner").mkdir(parents=True)
    (folder / "00000001.txt").write_text("a note")
    before = {p: p.stat().st_mtime_ns for p in (folder / "00000002").rglob("*")}
    saved(folder, 3, 4)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["00000001.txt", "00000002", "00000003", "00000004", "quarantine"]
    assert {p: p.stat().st_mtime_ns for p in (folder / "00000002").rglob("*")} == before


def test_deleting_where_a_deletion_was_killed(tmp_path: Path) -> None:
    """The same step again, with the first half-deleted folder still there."""
    folder = saved(tmp_path / "c", 1)
    (folder / ".deleting-00000001" / "inner").mkdir(parents=True)
    checkpoint.remove(folder / "00000001")
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("quick_compile")
def test_saving_by_the_clock(tmp_path: Path) -> None:
    """When the time between saves has passed after each step, each step is saved; the values are
    those of a run that is saved by steps alone, and each has the metrics of its own step."""

    def trained(folder: Path, minutes: float) -> tuple[training.Recorder, TrainState]:
        recorder = training.Recorder()
        updates = msgspec.structs.replace(training.CONFIG.training, save_every_minutes=minutes)
        config = msgspec.structs.replace(training.CONFIG, training=updates)
        return recorder, training.train(folder, recorder, config=config)

    often, seldom = trained(tmp_path / "a", 1e-9), trained(tmp_path / "b", 1e9)
    assert often[0].flushed == list(range(1, 9))
    assert seldom[0].flushed == [2, 4, 6, 8]
    assert same(often[1], seldom[1])
    assert training.deterministic(often[0]) == training.deterministic(seldom[0])
    metrics = [arrays.content(p)["metrics"] for p in sealed_checkpoints(tmp_path / "a")]
    loss = often[0].points
    assert metrics == [
        {"validation/loss": loss["validation/loss", 6]},
        {},
        {"validation/loss": loss["validation/loss", 8]},
    ]


@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_minutes_above_zero(value: str) -> None:
    """Or null; the error names the key."""
    with pytest.raises(ConfigError, match=r"training\.save_every_minutes"):
        load_config(None, {"training.save_every_minutes": value})


def test_retention_of_a_configuration() -> None:
    """Each key arrives at its place."""
    config = CheckpointsConfig(
        keep_last=5, keep_best=2, metric="eval/x", mode="max", keep_every_steps=7
    )
    assert Retention.of(config) == Retention(5, 2, "eval/x", "max", 7)
