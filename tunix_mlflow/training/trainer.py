"""The Trainer: model, optimizer, step specification and state in one object.

Whoever trains uses it: the loop, the benchmarks, and `runs verify`. Nobody else calls the jitted
step, so nobody else knows its arguments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future

import jax
import numpy as np

from tunix_mlflow.config.schema import Config
from tunix_mlflow.input import batches
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import decoder, lora
from tunix_mlflow.models.decoder import Graph, Params
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.runtime import devices
from tunix_mlflow.runtime.process import COMPILING
from tunix_mlflow.training import state as states
from tunix_mlflow.training import step as steps
from tunix_mlflow.training.spec import StepSpec, step_spec
from tunix_mlflow.training.state import InitialState
from tunix_mlflow.training.step import StepMetrics


class Trainer:
    """Trains one model on one or several devices.

    Attributes:
        config: resolved; `model`, `lora`, `optimizer`, `training`, `mesh` and `seed` are read.
        vocab_size: rows of the embedding table.
        device: the first device.
        spec: the static part of an update.
        state: parameters, optimizer state and step; replaced by every update.
        frozen: the parameters beside adapters; None: all are trained.
        base_digest: sha256 of the base model's weights; None without a base.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        device: jax.Device,
        spec: StepSpec,
        initial: InitialState,
        compiling: Future[float] | None = None,
    ) -> None:
        self.config, self.vocab_size, self.device, self.spec = config, vocab_size, device, spec
        self.state, self.frozen, self.base_digest = initial
        self._compiling = compiling

    @classmethod
    def create(
        cls,
        config: Config,
        vocab_size: int,
        device: jax.Device,
        base: Base | None = None,
        *,
        params: Params | None = None,
        compile_ahead: bool = False,
    ) -> Trainer:
        """Make a Trainer whose state is before the first update.

        Args:
            config: resolved by :func:`tunix_mlflow.training.resolve.resolve_auto`.
            vocab_size: rows of the embedding table.
            device: where arrays go; the first of several.
            base: the pretrained model to begin with; None: parameters are drawn.
            params: parameters to begin with, in place of `base` or drawn ones.
            compile_ahead: compile the step in a thread while parameters are read, and beyond.

        Raises:
            DeviceError: if there are fewer devices than the mesh needs.
            ModelError: if the base model cannot be read.
        """
        spec = step_spec(config, vocab_size, device)
        compiling = _compile_in_thread(spec, config, vocab_size, device) if compile_ahead else None
        if params is not None:
            initial = InitialState(states.init_state(spec, params, device), None, None)
        else:
            initial = states.load_state(spec, config, vocab_size, device, base)
        return cls(config, vocab_size, device, spec, initial, compiling)

    @property
    def updates(self) -> int:
        """Updates done; waits for the device."""
        return int(self.state.step)

    def compile(self, batch: Batch) -> float:
        """Compile the update for batches of this shape, unless that is done; return the seconds."""
        ahead = self._compiling.result() if self._compiling is not None else 0.0
        self._compiling = None
        start = time.perf_counter()
        steps.train_step.lower(self.state, batch, self.frozen, spec=self.spec).compile()
        seconds = ahead + time.perf_counter() - start
        devices.return_freed_memory()
        return seconds

    def step(self, batch: Batch) -> StepMetrics:
        """Dispatch one update; `state` is replaced, the arrays of the one before are gone.

        Returns:
            Metrics that are still on the device.
        """
        metrics: StepMetrics
        self.state, metrics = steps.train_step(self.state, batch, self.frozen, spec=self.spec)
        return metrics

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `validation/loss`, nats per trained token: summed on the device, divided once."""
        sums = [
            steps.eval_step(self.state.params, batch, self.frozen, spec=self.spec)
            for batch in batches
        ]
        losses, counts = jax.device_get(tuple(zip(*sums, strict=True)))
        return {"validation/loss": float(np.sum(losses, dtype=np.float64) / np.sum(counts))}

    def is_finite(self) -> bool:
        """Return whether every parameter is finite."""
        return bool(steps.is_finite(self.state.params))

    def fingerprint(self) -> dict[str, str]:
        """Return what the bits of a training depend on besides data and configuration."""
        microbatch = {"microbatch_size": str(self.config.training.microbatch_size)}
        return devices.fingerprint(self.device, self.config.mesh) | microbatch

    @property
    def graph(self) -> Graph:
        """The model's plain form, in which it is logged and generates."""
        return decoder.shape(self.config.model, self.vocab_size)[0]

    def merged_params(self) -> Params:
        """Return all parameters as a model is logged: plain layout, one device, float32.

        Frozen ones in the scanned layout are used up, since memory may hold them once only: the
        trainer cannot train afterwards.
        """
        params = self.state.params
        if self.frozen is not None:
            base = self.frozen
            if self.spec.stack:
                base = decoder.unstack(base, consume=True)
            params = lora.merged(params, base, self.config.lora)
        return decoder.as_type(jax.device_put(params, self.device), "float32")


def lower_step(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device
) -> jax.stages.Lowered:
    """Trace and lower the update without making an array.

    Args:
        spec: of this configuration.
        config: resolved.
        vocab_size: rows of the embedding table.
        device: the first of several.
    """
    state, frozen = states.abstract_state(spec, config, vocab_size, device)
    batch = batches.blank(config.training.batch_size, config.data.sequence_length or 0)
    return steps.train_step.lower(state, batch, frozen, spec=spec)


def _compile_in_thread(
    spec: StepSpec, config: Config, vocab_size: int, device: jax.Device
) -> Future[float]:
    """Compile the update in a thread; the result is the seconds that it took.

    Tracing and lowering are done before the thread begins: two threads of Python are no faster than
    one, and the compiler would wait for them.
    """
    start = time.perf_counter()
    lowered = lower_step(spec, config, vocab_size, device)
    future: Future[float] = Future()

    def compile_lowered() -> None:
        try:
            lowered.compile()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(time.perf_counter() - start)

    # Not a daemon: ending Python while XLA compiles can abort the process. The command line does
    # not wait for it, see `runtime.process`.
    threading.Thread(target=compile_lowered, name=COMPILING).start()
    return future
