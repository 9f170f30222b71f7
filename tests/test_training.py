"""The loop: resume bit for bit, stop on a signal, stop on a bad loss."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest

from tests.conftest import tiny
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config, DataConfig
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.errors import DeviceError, Interrupted, TrainingStopped
from tunix_mlflow.input.batches import Batch, TrainBatches, eval_batches
from tunix_mlflow.input.packing import lay_out_rows
from tunix_mlflow.input.tokens import encode_examples
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.signals import StopRequest
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import callbacks
from tunix_mlflow.training.checkpoint import Checkpoints, Retention, sealed_checkpoints
from tunix_mlflow.training.loop import Callback, Loop, fit
from tunix_mlflow.training.resolve import microbatch_rows, resolve_auto
from tunix_mlflow.training.spec import StepSpec, step_spec
from tunix_mlflow.training.state import TrainState, load_state
from tunix_mlflow.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")
VOCABULARY = ByteTokenizer.vocab_size
GIVEN = load_config(
    None,
    tiny(training__steps="8", optimizer__name="muon", data__sequence_length="64"),
)
CONFIG = resolve_auto(GIVEN, VOCABULARY, "cpu")
TOKENIZED = encode_examples(
    [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 20)],
    ByteTokenizer(),
    DataConfig(),
)
ROWS = lay_out_rows(TOKENIZED, CONFIG.data, 64)


@pytest.mark.parametrize(
    ("batch", "length", "platform", "expected"),
    [
        (8, 128, "cpu", 4),
        (8, 256, "cpu", 2),
        (8, 4096, "cpu", 1),
        (9, 64, "cpu", 3),
        (7, 128, "cpu", 1),
        (16, 16, "cpu", 16),
        (8, 4096, "gpu", 8),
    ],
)
def test_a_microbatch_fits_the_cache(batch: int, length: int, platform: str, expected: int) -> None:
    """On a CPU rows of at most 512 tokens, or one; elsewhere the whole batch."""
    assert microbatch_rows(batch, length, platform) == expected


class Recorder:
    """A MetricWriter for the tests."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], float] = {}
        self.flushed: list[int] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            assert (key, step) not in self.points
            self.points[key, step] = value

    def flush(self) -> None:
        self.flushed.append(max(s for _, s in self.points))


class SignalAt(Recorder):
    """Sends this process a signal when it is given the loss of a step."""

    def __init__(self, at: int, signum: int) -> None:
        super().__init__()
        self.at, self.signum = at, signum

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics(metrics, step)
        if step == self.at and "train/loss" in metrics:
            os.kill(os.getpid(), self.signum)


@lru_cache
def spec() -> StepSpec:
    """One for all trainers, so that their step is compiled once."""
    return step_spec(CONFIG, VOCABULARY, devices.use("cpu"))


def new_trainer(config: Config = CONFIG) -> Trainer:
    """A trainer before its first update; `config` may differ from CONFIG around the updates."""
    device = devices.use("cpu")
    initial = load_state(spec(), config, VOCABULARY, device, None)
    return Trainer(config, VOCABULARY, device, spec(), initial)


def train(
    folder: Path,
    recorder: Recorder,
    stream: TrainBatches | None = None,
    *,
    config: Config = CONFIG,
) -> TrainState:
    """One part of a run: restore what is there, train to the end."""
    trainer = new_trainer(config)
    checkpoints = Checkpoints(folder, {}, retention=Retention(3))
    restored = checkpoints.restore_latest(trainer.state, print)
    if restored is not None:
        trainer.state = restored[1]
    save = callbacks.Save(checkpoints, config.training)
    acting: list[Callback] = [callbacks.Log([recorder])]
    acting += [callbacks.Evaluate(lambda: eval_batches(ROWS, 4), 2), save, callbacks.Stop(save)]
    try:
        fit(trainer, stream or TrainBatches(ROWS, batch_size=4, seed=0), acting)
    finally:
        checkpoints.close()
    return trainer.state


def train_unrecorded(trainer: Trainer, checkpoints: Checkpoints) -> TrainState:
    """Nothing but saving around the updates."""
    fit(
        trainer,
        TrainBatches(ROWS, batch_size=4, seed=0),
        [callbacks.Save(checkpoints, trainer.config.training)],
    )
    return trainer.state


def same(a: TrainState, b: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Recorder]:
    """A run without an interruption."""
    recorder = Recorder()
    return train(tmp_path_factory.mktemp("whole"), recorder), recorder


def deterministic(*recorders: Recorder) -> dict[tuple[str, int], float]:
    """(key, step) -> value of what must repeat, later parts over earlier ones."""
    merged: dict[tuple[str, int], float] = {}
    for recorder in recorders:
        merged |= recorder.points
    return {k: v for k, v in merged.items() if k[0].startswith(("train/", "validation/"))}


def test_loss_falls_and_everything_is_recorded(
    whole: tuple[TrainState, Recorder],
) -> None:
    """Each step once, evaluation where configured, metrics on disk before each checkpoint."""
    state, recorder = whole
    assert int(state.step) == 8
    losses = [recorder.points["train/loss", s] for s in range(1, 9)]
    assert losses[-1] < losses[0]
    assert sorted(s for k, s in recorder.points if k == "validation/loss") == [2, 4, 6, 8]
    assert recorder.flushed == [2, 4, 6, 8]
    assert ("train_perf/step_time_ms", 1) not in recorder.points
    assert (
        0
        < recorder.points["train_perf/compile_ms", 1]
        < recorder.points["train_perf/first_step_ms", 1]
    )


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    whole: tuple[TrainState, Recorder], tmp_path: Path, at: int, signum: int
) -> None:
    """Interrupted after any step, the end is bit-identical: parameters, optimizer, metrics."""
    first, second = SignalAt(at, signum), Recorder()
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, first)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    saved = int(sealed_checkpoints(tmp_path)[-1].name)
    assert at <= saved <= at + 1
    state = train(tmp_path, second)
    assert min(s for _, s in second.points) == saved + 1
    assert same(state, whole[0])
    assert deterministic(first, second) == deterministic(whole[1])


def test_resuming_at_another_position_is_noticed(
    whole: tuple[TrainState, Recorder], tmp_path: Path
) -> None:
    """The negative test: with the data position left out, the result differs."""

    class Restarted(TrainBatches):
        def at(self, step: int) -> Batch:
            return super().at(step - 4)

    with pytest.raises(Interrupted):
        train(tmp_path, SignalAt(3, signal.SIGTERM))
    stream = Restarted(ROWS, batch_size=4, seed=0)
    assert not same(train(tmp_path, Recorder(), stream), whole[0])


def test_resuming_without_the_optimizer_is_noticed(
    whole: tuple[TrainState, Recorder], tmp_path: Path
) -> None:
    """The other negative test: parameters alone are not the state."""
    with pytest.raises(Interrupted):
        train(tmp_path, SignalAt(3, signal.SIGTERM))
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    trainer = new_trainer()
    restored = checkpoints.restore_latest(trainer.state, print)
    assert restored is not None
    trainer.state = restored[1]._replace(opt_state=trainer.state.opt_state)
    state = train_unrecorded(trainer, checkpoints)
    checkpoints.close()
    assert not same(state, whole[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The step is named, and no checkpoint holds the state."""
    trainer = new_trainer()
    params = jax.tree.map(lambda x: x * np.nan, trainer.state.params)
    trainer.state = trainer.state._replace(params=params)
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    with pytest.raises(TrainingStopped, match="step 1: train/loss is nan"):
        train_unrecorded(trainer, checkpoints)
    checkpoints.close()
    assert sealed_checkpoints(tmp_path) == []


def test_an_update_that_breaks_the_model_is_never_saved(tmp_path: Path) -> None:
    """The loss before the update was finite; the parameters after it are checked too."""
    config = load_config(
        None,
        tiny(
            training__steps="1",
            optimizer__name="adamw",
            optimizer__warmup_steps="0",
            optimizer__learning_rate="1e38",
            data__sequence_length="64",
        ),
    )
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    with pytest.raises(TrainingStopped, match="step 1: a parameter is not finite"):
        resolved = resolve_auto(config, VOCABULARY, "cpu")
        trainer = Trainer.create(resolved, VOCABULARY, devices.use("cpu"))
        train_unrecorded(trainer, checkpoints)
    checkpoints.close()
    assert sealed_checkpoints(tmp_path) == []


def test_callbacks_act_in_their_order() -> None:
    """Around every update each acts in the order of the list; all clean up, in reverse."""
    calls: list[str] = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def before_step(self, loop: Loop, batch: Batch) -> None:
            calls.append(f"{self.name} before {loop.step + 1}")

        def after_step(self, loop: Loop) -> None:
            calls.append(f"{self.name} after {loop.step}")

        def on_end(self, loop: Loop) -> None:
            calls.append(f"{self.name} end")

    trainer = new_trainer()
    trainer.config = msgspec.structs.replace(
        CONFIG, training=msgspec.structs.replace(CONFIG.training, steps=2)
    )
    fit(trainer, TrainBatches(ROWS, batch_size=4, seed=0), [Named("a"), Named("b")])
    steps = [
        f"{name} {when} {step}" for step in (1, 2) for when in ("before", "after") for name in "ab"
    ]
    assert calls == [*steps, "b end", "a end"]


def test_a_profile_is_a_trace_of_some_updates(tmp_path: Path) -> None:
    """The trace is written, and stopped when the loop ends before it."""
    for updates in (2, 100):
        folder = tmp_path / str(updates)
        profile = callbacks.Profile(folder, updates)
        fit(new_trainer(), TrainBatches(ROWS, batch_size=4, seed=0), [profile])
        assert list(folder.rglob("*.xplane.pb"))


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insisting, two seconds later, stops at once; at the same moment it is the same wish."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        stop._since -= 2.0
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_no_handler_outside_the_main_thread() -> None:
    """A loop in a thread, as in a notebook's server, leaves signals alone."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def inside() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("device", ["gpu", "tpu", "gpu:1", "cpu:7"])
def test_a_device_that_is_not_there(device: str) -> None:
    """Fails closed, says what there is."""
    if any(d.platform == device.partition(":")[0] for d in jax.devices()) and device != "cpu:7":
        pytest.skip("this machine has one")
    with pytest.raises(DeviceError, match=f"device={device}"):
        devices.use(device)
