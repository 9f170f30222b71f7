"""From examples to token ids: what a tokenizer can do, and the one of models from scratch.

The byte tokenizer has one id a UTF-8 byte, and one a marker of the conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tunix_mlflow.data.examples import Example
from tunix_mlflow.text import byte_template
from tunix_mlflow.text.byte_template import ANSWER, BOS, EOS, ROLE_MARKERS, Segment

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

PAD = "<pad>"
MARKERS = (PAD, BOS, EOS, ANSWER, *ROLE_MARKERS.values())
_FIRST_BYTE = 16  # ids below are kept for markers


class Tokenizer(Protocol):
    """A tokenizer together with the chat template that it writes examples by."""

    @property
    def name(self) -> str:
        """What it is called in records."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def pad_id(self) -> int:
        """Fills rows up."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Each ends a completion."""

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of everything that decides an encoding, the template aside."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """What it was read from, by name; empty where it is built in."""

    def template_digest(self, include_steps: bool) -> str:
        """sha256 (64 hex) of what decides how an example is written."""

    def example(self, example: Example, *, include_steps: bool) -> tuple[Ids, Mask]:
        """Ids [n] of a whole example and, for each, whether it is trained on."""

    def prompt(self, example: Example) -> Ids:
        """Ids of what a model is given: everything before the completion."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of ids."""

    def spell(self, ids: Sequence[int] | Ids) -> str:
        """Text of ids, special tokens as well."""

    def answer(self, ids: Sequence[int] | Ids) -> str | None:
        """The answer in a completion; None where it never came to one."""


class ByteTokenizer:
    """Every text round-trips; markers are ids, so no text can imitate one."""

    name = "bytes-v1"
    vocab_size = _FIRST_BYTE + 256
    pad_id = 0
    eos_id = MARKERS.index(EOS)
    eos_ids = (eos_id,)
    files: Mapping[str, bytes] = {}

    def __init__(self) -> None:
        self._ids = {marker: number for number, marker in enumerate(MARKERS)}

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of everything that decides an encoding."""
        return hashlib.sha256(f"{self.name}:{_FIRST_BYTE}:{','.join(MARKERS)}".encode()).hexdigest()

    def template_digest(self, include_steps: bool) -> str:
        """sha256 (64 hex) of what decides the rendering."""
        return byte_template.template_digest(include_steps)

    def example(self, example: Example, *, include_steps: bool) -> tuple[Ids, Mask]:
        """Ids [n] of a whole example and, for each, whether it is trained on."""
        return self.encode(byte_template.render(example, include_steps=include_steps))

    def prompt(self, example: Example) -> Ids:
        """Ids of everything before the completion."""
        return self.encode(byte_template.render_prompt(example))[0]

    def encode(self, segments: Iterable[Segment]) -> tuple[Ids, Mask]:
        """Ids [n] and, for each, whether it is trained on."""
        ids: list[int] = []
        trained: list[bool] = []
        for segment in segments:
            if segment.marker:
                part = [self._ids[segment.text]]
            else:
                part = [_FIRST_BYTE + byte for byte in segment.text.encode("utf-8")]
            ids.extend(part)
            trained.extend([segment.trained] * len(part))
        return np.array(ids, np.int32), np.array(trained, np.bool_)

    def answer(self, ids: Sequence[int] | Ids) -> str | None:
        """The answer in a completion: what follows the last answer marker, stripped.

        The marker is looked for as an id, so that an answer may spell it as text.

        Returns:
            None when the completion never came to an answer.
        """
        numbers = [int(i) for i in ids]
        marker = self._ids[ANSWER]
        if marker not in numbers:
            return None
        start = len(numbers) - numbers[::-1].index(marker)
        stop = numbers.index(self.eos_id, start) if self.eos_id in numbers[start:] else None
        return self.decode(numbers[start:stop]).strip()

    def spell(self, ids: Sequence[int] | Ids) -> str:
        """As :meth:`decode`, which leaves no marker out."""
        return self.decode(ids)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text, with markers spelled out and broken UTF-8 replaced by U+FFFD."""
        parts: list[str] = []
        pending = bytearray()
        for number in (int(i) for i in ids):
            if number >= _FIRST_BYTE:
                pending.append(number - _FIRST_BYTE)
                continue
            parts.append(pending.decode("utf-8", errors="replace"))
            pending.clear()
            parts.append(MARKERS[number] if number < len(MARKERS) else f"<{number}>")
        parts.append(pending.decode("utf-8", errors="replace"))
        return "".join(parts)
