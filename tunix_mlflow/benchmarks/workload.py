"""What a suite trains: a dataset, or generated documents that can be learnt."""

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
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.runtime import devices
from tunix_mlflow.tracking.tags import PREFIX
from tunix_mlflow.training.inputs import read_inputs
from tunix_mlflow.training.resolve import resolve_auto, with_base_shape
from tunix_mlflow.training.trainer import Trainer

_LENGTH = 256


class Workload(NamedTuple):
    """A trainer before its first update, and its batches."""

    config: Config  # resolved
    manifest: Manifest | None  # None: generated documents
    trainer: Trainer
    batches: TrainBatches
    device: jax.Device

    def environment_tags(self) -> dict[str, str]:
        """Return, as tags of a run, what the figures depend on in addition to the configuration."""
        fingerprint = devices.fingerprint(self.device, self.config.mesh)
        return {f"{PREFIX}{name}": value for name, value in fingerprint.items()}


def from_dataset(
    config: Config, manifest: Manifest, device: jax.Device, base: Base | None = None
) -> Workload:
    """Return the workload of a training on a dataset.

    Raises:
        ConfigError, DatasetError: see :func:`tunix_mlflow.training.inputs.read_inputs`.
    """
    inputs = read_inputs(config, manifest, device, base)
    trainer = Trainer.create(inputs.config, inputs.vocab_size, device, base)
    return Workload(inputs.config, manifest, trainer, inputs.train_batches(), device)


def generated(config: Config, device: jax.Device, base: Base | None = None) -> Workload:
    """Return a workload of generated documents; see `benchmark.data` and `benchmark.vocabulary`.

    Raises:
        ConfigError: if the configuration says another shape than the base has.
    """
    if base is not None:
        config = with_base_shape(config, base.config)
    vocab_size = config.model.vocab_size or config.benchmark.vocabulary
    length = config.data.sequence_length or _LENGTH
    data = msgspec.structs.replace(config.data, sequence_length=length)
    config = msgspec.structs.replace(config, data=data)
    config = resolve_auto(config, vocab_size, device.platform)
    trainer = Trainer.create(config, vocab_size, device, base)
    kind = "mix" if config.benchmark.data == "mix" else "full"
    count = 16 * config.training.batch_size
    stream = TrainBatches(
        token_rows(
            documents(kind, count, length, config.benchmark.vocabulary),
            length,
            packing=config.data.packing,
        ),
        batch_size=config.training.batch_size,
        seed=config.seed,
    )
    return Workload(config, None, trainer, stream, device)


def documents(kind: str, count: int, length: int, vocab_size: int) -> list[npt.NDArray[np.int32]]:
    """Return documents of token ids; four of five tokens follow from the token before them.

    Args:
        kind: `full`: each of `length` tokens; `mix`: lognormal, median 80, at most `length`.
        count: how many.
        length: tokens of a row.
        vocab_size: ids are 2 and more; 0 is padding and 1 an end in some trainers.
    """
    rng = np.random.default_rng(7)
    successor = rng.permutation(vocab_size - 2) + 2
    result = []
    for _ in range(count):
        size = length if kind == "full" else int(np.clip(rng.lognormal(np.log(80), 0.7), 8, length))
        ids = rng.integers(2, vocab_size, size)
        for index in range(1, size):
            if rng.random() < 0.8:
                ids[index] = successor[ids[index - 1] - 2]
        result.append(ids.astype(np.int32))
    return result


def token_rows(documents: list[npt.NDArray[np.int32]], length: int, *, packing: bool) -> TokenRows:
    """Return rows of documents; every token is trained on."""
    tokenized = tokens.from_arrays((ids, np.ones(len(ids), np.bool_)) for ids in documents)
    return lay_out_rows(tokenized, DataConfig(packing=packing), length)
