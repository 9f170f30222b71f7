"""What a run trains on: splits of a dataset as rows of tokens, and the resolved configuration."""

from __future__ import annotations

from typing import NamedTuple

import jax

from tunix_mlflow.config.identity import trajectory_digest
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.examples import Example, example_id, form_of, is_preference, is_text
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.evaluation import scoring
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.input.packing import TokenRows, lay_out_rows, longest_completion
from tunix_mlflow.input.tokens import Loss, describe_loss, encode_examples, longest
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.text.tokenizer import Tokenizer
from tunix_mlflow.training.resolve import resolve_auto, with_base_shape, with_length

_PROMPTS = 3
"""Prompts that a logged model keeps as its input example."""
_BEGINNING = 80  # characters of a text


class TrainingInputs(NamedTuple):
    """Rows of tokens and all that was decided about them; no weights yet."""

    config: Config  # resolved
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenRows
    validation: TokenRows | None  # None: the dataset has no such split
    samples: list[Example]  # of the validation split, with an expected answer
    prompts: list[str]  # an input example for the logged model
    forms: tuple[str, ...]  # what the train examples end with; see form_of
    train_examples: int
    validation_examples: int
    max_new_tokens: int  # of a completion, where nothing is configured
    losses: list[tuple[Loss, str]]  # what the tokens lack of the examples, and a line on it
    device: jax.Device  # the first of several

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.config.model.vocab_size or self.tokenizer.vocab_size

    def train_batches(self) -> TrainBatches:
        """Return the batches of every step."""
        training = self.config.training
        return TrainBatches(self.train, batch_size=training.batch_size, seed=self.config.seed)

    def identity(self, base_digest: str | None) -> dict[str, str]:
        """Return the digests of what decides the path of the parameters."""
        digests = {
            "dataset_digest": self.manifest.digest,
            "tokenizer_digest": self.tokenizer.digest,
            "template_digest": self.tokenizer.template_digest(self.config.data),
            "trajectory_digest": trajectory_digest(self.config),
        }
        return digests if base_digest is None else digests | {"base_digest": base_digest}

    def summary(self) -> str:
        """Return the size of the splits in one line."""
        rows = self.train
        left = [
            (rows.truncated, "are cut"),
            (rows.dropped, "are too long, and left out"),
            (rows.empty, "have no token to train on, and are left out"),
        ]
        return (
            f"{self.manifest.key}: {self.train_examples:,} examples in {len(self.train.rows):,}"
            f" rows of {self.config.data.sequence_length} tokens ({self.train.fill:.0%} full),"
            f" {self.validation_examples:,} for validation"
            + "".join(f"; {count:,} {what}" for count, what in left if count)
        )


def read_inputs(
    config: Config, manifest: Manifest, device: jax.Device, base: Base | None = None
) -> TrainingInputs:
    """Read the splits, tokenize each example once, lay out rows, and resolve the configuration.

    Args:
        config: the run's.
        manifest: of a dataset that is verified and has a snapshot.
        device: where arrays go.
        base: the pretrained model that `config.base` names.

    Raises:
        ConfigError: if the configuration says another shape than the base has, or LoRA without a
            base.
        DatasetError: for a split that is not there, or examples longer than attention takes.
    """
    from tunix_mlflow.data import snapshot  # late: Arrow, which rows in memory do not need

    train, validation = config.data.train_split, config.data.validation_split
    if train not in manifest.splits:
        raise DatasetError(
            f"dataset {manifest.key} has no split {train!r}; it has {', '.join(manifest.splits)}"
        )
    tokenizer: Tokenizer = ByteTokenizer()
    if base is not None:
        tokenizer, config = base.tokenizer, with_base_shape(config, base.config)
    names = [name for name in (train, validation) if name in manifest.splits]
    examples = snapshot.read_splits(manifest.digest, names)
    if any(is_preference(example) for name in names for example in examples[name]):
        raise DatasetError(
            f"dataset {manifest.key} is preference data, whose answers are not all to be learned;"
            " supervised training does not use it"
        )
    encoded = {name: encode_examples(examples[name], tokenizer, config.data) for name in names}
    losses = [
        (loss, describe_loss(loss, len(found), example_id(found[loss.first_example]), name))
        for name, found in examples.items()
        for loss in encoded[name].losses
    ]
    config = with_length(config, longest(*encoded.values()))
    config = resolve_auto(config, config.model.vocab_size or tokenizer.vocab_size, device.platform)
    length = config.data.sequence_length or 0
    rows = {name: lay_out_rows(encoded[name], config.data, length) for name in names}
    held_out = examples.get(validation, [])
    return TrainingInputs(
        config=config,
        manifest=manifest,
        tokenizer=tokenizer,
        train=rows[train],
        validation=rows.get(validation),
        samples=scoring.scorable(held_out, config.evaluation.samples),
        prompts=[_asked(example) for example in (held_out or examples[train])[:_PROMPTS]],
        forms=tuple(sorted({form_of(example) for example in examples[train]})),
        train_examples=len(examples[train]),
        validation_examples=len(held_out),
        max_new_tokens=config.evaluation.max_new_tokens or longest_completion(rows[train]),
        losses=losses,
        device=device,
    )


def _asked(example: Example) -> str:
    """Return a prompt as a user would give it: of a text without turns its beginning."""
    return example.messages[-1].text[:_BEGINNING] if is_text(example) else example.prompt
