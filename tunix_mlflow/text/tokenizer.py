"""The interface of a tokenizer together with its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.text.fidelity import Finding

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Encoded(NamedTuple):
    """The tokens of an example."""

    ids: Ids  # [n]
    trained: Mask  # [n]
    findings: tuple[Finding, ...] = ()  # what they lack; see fidelity


class Tokenizer(Protocol):
    """A tokenizer and the chat template that examples are rendered with."""

    @property
    def name(self) -> str:
        """Its name in records."""

    @property
    def vocab_size(self) -> int:
        """All ids are below this number."""

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of everything that decides an encoding, except the template."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files it was read from; empty for a built-in tokenizer."""

    def template_digest(self, config: DataConfig) -> str:
        """Return the sha256 (64 hex) of what decides how an example is rendered."""

    def encode_example(self, example: Example, config: DataConfig) -> Encoded:
        """Return the ids of a whole example, and which are trained on."""

    def encode_prompt(self, example: Example, config: DataConfig) -> Ids:
        """Return the ids of what a model is given: everything before the completion."""

    def decode(self, ids: Sequence[int] | Ids, *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, with or without special tokens."""

    def read_answer(self, ids: Sequence[int] | Ids, *, marked: bool) -> str | None:
        """Return the answer in a completion, or None if there is none.

        Args:
            ids: of the completion.
            marked: whether completions are known to mark their answer.
        """
