"""What a suite trains on: documents of tokens that are made up, and can be learnt."""

from __future__ import annotations

from typing import NamedTuple

import jax
import msgspec
import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import Config, DataConfig
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.input import tokens
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.input.packing import TokenRows, lay_out_rows
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.runtime import devices
from tunix_mlflow.training import setup
from tunix_mlflow.training.step import StepSpec, TrainState

_LENGTH = 256


def documents(data: str, count: int, length: int, vocab_size: int) -> list[npt.NDArray[np.int32]]:
    """Token ids, of which four of five follow from the one before.

    Args:
        data: `full`: each of `length` tokens; `mix`: lognormal, median 80, at most `length`.
        count: how many.
        length: tokens of a row.
        vocab_size: ids are 2 and more; 0 is padding and 1 an end in some trainers.
    """
    rng = np.random.default_rng(7)
    follows = rng.permutation(vocab_size - 2) + 2
    made = []
    for _ in range(count):
        size = length if data == "full" else int(np.clip(rng.lognormal(np.log(80), 0.7), 8, length))
        ids = rng.integers(2, vocab_size, size)
        for place in range(1, size):
            if rng.random() < 0.8:
                ids[place] = follows[ids[place - 1] - 2]
        made.append(ids.astype(np.int32))
    return made


def rows(made: list[npt.NDArray[np.int32]], length: int, *, packing: bool) -> TokenRows:
    """Rows of documents whose every token is trained on."""
    tokenized = tokens.from_arrays((ids, np.ones(len(ids), np.bool_)) for ids in made)
    return lay_out_rows(tokenized, DataConfig(packing=packing), length)


class Work(NamedTuple):
    """What is trained, and how."""

    config: Config  # settled
    manifest: Manifest | None  # None: made up
    spec: StepSpec
    state: TrainState
    batches: TrainBatches
    device: jax.Device
    frozen: Params | None = None  # the parameters beside adapters

    def tags(self) -> dict[str, str]:
        """What the figures depend on besides, for the run."""
        found = devices.fingerprint(self.device, self.config.mesh)
        return {f"tunix_mlflow.{name}": value for name, value in found.items()}


def of_dataset(
    config: Config, manifest: Manifest, device: jax.Device, base: Base | None = None
) -> Work:
    """What training would do with a dataset.

    Raises:
        DatasetError: as `training.setup.assemble`.
    """
    made = setup.assemble(config, manifest, device, base)
    stream = made.train_batches()
    return Work(made.config, manifest, made.spec, made.state, stream, device, made.frozen)


def made_up(config: Config, device: jax.Device, base: Base | None = None) -> Work:
    """Documents by `benchmark.data` and `benchmark.vocabulary`."""
    if base is not None:
        config = setup.of_base(config, base)
    size = config.model.vocab_size or config.benchmark.vocabulary
    length = config.data.sequence_length or _LENGTH
    data = msgspec.structs.replace(config.data, sequence_length=length)
    config = msgspec.structs.replace(config, data=data)
    config = setup.resolve_auto(config, size, device.platform)
    spec = setup.step_spec(config, size, device)
    state, frozen, _ = setup.start(spec, config, size, device, base)
    kind = "mix" if config.benchmark.data == "mix" else "full"
    made = documents(kind, 16 * config.training.batch_size, length, config.benchmark.vocabulary)
    stream = TrainBatches(
        rows(made, length, packing=config.data.packing),
        batch_size=config.training.batch_size,
        seed=config.seed,
    )
    return Work(config, None, spec, state, stream, device, frozen)
