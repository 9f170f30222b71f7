"""The loop: resume bit for bit, stop on a signal, stop on a bad loss."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.conftest import ROOT, tiny
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.errors import DeviceError, Interrupted, TrainingStopped
from tunix_mlflow.input import batches, packing, tokens
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import decoder
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.signals import StopRequest
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import loop, optimizer, setup, step
from tunix_mlflow.training.checkpoint import Checkpoints, Retention, steps

CONFIG = load_config(
    None, tiny(training__steps="8", optimizer__name="muon"), ROOT / "projects" / "configs"
)
EXAMPLES = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 20)]
ROWS = packing.lay_out_rows(
    tokens.encode_examples(EXAMPLES, ByteTokenizer(), True), CONFIG.data, 64
)
RULE = optimizer.build(CONFIG.optimizer, CONFIG.training.steps)
PLAN = step.StepSpec(decoder.shape(CONFIG.model, ByteTokenizer.vocab_size)[0], RULE)


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
    assert setup.microbatch(batch, length, platform) == expected


class Recorder:
    """A MetricWriter for the tests; `at` may act on a step."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], float] = {}
        self.flushed: list[int] = []

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            assert (key, step) not in self.points
            self.points[key, step] = value

    def flush(self) -> None:
        self.flushed.append(max(s for _, s in self.points))


class SignalAt(Recorder):
    """Sends this process a signal when it is told of a step."""

    def __init__(self, at: int, signum: int) -> None:
        super().__init__()
        self.at, self.signum = at, signum

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        super().write_scalars(step, scalars)
        if step == self.at and "train/loss" in scalars:
            os.kill(os.getpid(), self.signum)


def fresh() -> step.TrainState:
    _, params = decoder.build(CONFIG.model, ByteTokenizer.vocab_size, 0)
    return step.init_state(params, RULE)


def fit(
    folder: Path,
    recorder: Recorder,
    *,
    config: Config = CONFIG,
    stream: batches.TrainBatches | None = None,
) -> step.TrainState:
    """One part of a run: restore what is there, go on to the end."""
    checkpoints = Checkpoints(folder, {}, retention=Retention(3))
    restored = checkpoints.restore_latest(fresh(), print)
    try:
        return loop.fit(
            config,
            fresh() if restored is None else restored[1],
            stream or batches.TrainBatches(ROWS, batch_size=4, seed=0),
            spec=PLAN,
            writers=[recorder],
            checkpoints=checkpoints,
            evaluate=lambda s: loop.held_out_loss(PLAN, s.params, batches.eval_batches(ROWS, 4)),
        )
    finally:
        checkpoints.close()


def bare(
    state: step.TrainState,
    checkpoints: Checkpoints,
    config: Config = CONFIG,
    rule: optax.GradientTransformation = RULE,
) -> step.TrainState:
    """The loop with nobody watching."""
    return loop.fit(
        config,
        state,
        batches.TrainBatches(ROWS, batch_size=4, seed=0),
        spec=PLAN._replace(optimizer=rule),
        writers=[],
        checkpoints=checkpoints,
        evaluate=None,
    )


def same(a: step.TrainState, b: step.TrainState) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[step.TrainState, Recorder]:
    """A run without an interruption."""
    recorder = Recorder()
    return fit(tmp_path_factory.mktemp("whole"), recorder), recorder


def deterministic(*recorders: Recorder) -> dict[tuple[str, int], float]:
    """(key, step) -> value of what must repeat, later parts over earlier ones."""
    merged: dict[tuple[str, int], float] = {}
    for recorder in recorders:
        merged |= recorder.points
    return {k: v for k, v in merged.items() if k[0].startswith(("train/", "eval/"))}


def test_loss_falls_and_everything_is_recorded(
    whole: tuple[step.TrainState, Recorder],
) -> None:
    """Each step once, evaluation where configured, metrics on disk before each checkpoint."""
    state, recorder = whole
    assert int(state.step) == 8
    losses = [recorder.points["train/loss", s] for s in range(1, 9)]
    assert losses[-1] < losses[0]
    assert sorted(s for k, s in recorder.points if k == "eval/loss") == [2, 4, 6, 8]
    assert recorder.flushed == [2, 4, 6, 8]
    assert ("perf/step_time_ms", 1) not in recorder.points
    assert 0 < recorder.points["perf/compile_ms", 1] < recorder.points["perf/first_step_ms", 1]


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    whole: tuple[step.TrainState, Recorder], tmp_path: Path, at: int, signum: int
) -> None:
    """Interrupted after any step, the end is bit-identical: parameters, optimizer, metrics."""
    first, second = SignalAt(at, signum), Recorder()
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path, first)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    saved = int(steps(tmp_path)[-1].name)
    assert at <= saved <= at + 1
    state = fit(tmp_path, second)
    assert min(s for _, s in second.points) == saved + 1
    assert same(state, whole[0])
    assert deterministic(first, second) == deterministic(whole[1])


def test_resuming_at_another_position_is_noticed(
    whole: tuple[step.TrainState, Recorder], tmp_path: Path
) -> None:
    """The negative test: with the data position left out, the result differs."""

    class Restarted(batches.TrainBatches):
        def at(self, step: int) -> Batch:
            return super().at(step - 4)

    with pytest.raises(Interrupted):
        fit(tmp_path, SignalAt(3, signal.SIGTERM))
    stream = Restarted(ROWS, batch_size=4, seed=0)
    assert not same(fit(tmp_path, Recorder(), stream=stream), whole[0])


def test_resuming_without_the_optimizer_is_noticed(
    whole: tuple[step.TrainState, Recorder], tmp_path: Path
) -> None:
    """The other negative test: parameters alone are not the state."""
    with pytest.raises(Interrupted):
        fit(tmp_path, SignalAt(3, signal.SIGTERM))
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    restored = checkpoints.restore_latest(fresh(), print)
    assert restored is not None
    lost = restored[1]._replace(opt_state=fresh().opt_state)
    state = bare(lost, checkpoints)
    checkpoints.close()
    assert not same(state, whole[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The step is named, and no checkpoint is poisoned."""
    state = fresh()
    params = jax.tree.map(lambda x: x * np.nan, state.params)
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    with pytest.raises(TrainingStopped, match="step 1: train/loss is nan"):
        bare(state._replace(params=params), checkpoints)
    checkpoints.close()
    assert steps(tmp_path) == []


def test_an_update_that_breaks_the_model_is_never_saved(tmp_path: Path) -> None:
    """The loss before the update was fine; the parameters after it are looked at too."""
    config = load_config(
        None,
        tiny(
            training__steps="1",
            optimizer__name="adamw",
            optimizer__warmup_steps="0",
            optimizer__learning_rate="1e38",
        ),
        ROOT / "projects" / "configs",
    )
    rule = optimizer.build(config.optimizer, 1)
    _, params = decoder.build(config.model, ByteTokenizer.vocab_size, 0)
    checkpoints = Checkpoints(tmp_path, {}, retention=Retention(3))
    with pytest.raises(TrainingStopped, match="step 1: a parameter is not finite"):
        bare(step.init_state(params, optimizer=rule), checkpoints, config, rule)
    checkpoints.close()
    assert steps(tmp_path) == []


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
