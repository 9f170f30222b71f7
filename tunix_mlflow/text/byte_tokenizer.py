"""The tokenizer of models trained from scratch: one id per UTF-8 byte, and one per marker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example
from tunix_mlflow.text import answers, byte_template
from tunix_mlflow.text.byte_template import ANSWER, BOS, EOS, ROLE_MARKERS, Segment
from tunix_mlflow.text.tokenizer import Encoded, Ids, Mask

PAD = "<pad>"
MARKERS = (PAD, BOS, EOS, ANSWER, *ROLE_MARKERS.values())
_FIRST_BYTE = 16  # smaller ids are reserved for markers


class ByteTokenizer:
    """A tokenizer that round-trips every text. Markers are ids, so no text can imitate one."""

    name = "bytes-v1"
    vocab_size = _FIRST_BYTE + 256
    pad_id = 0
    eos_id = MARKERS.index(EOS)
    eos_ids = (eos_id,)
    files: Mapping[str, bytes] = {}

    def __init__(self) -> None:
        self._ids = {marker: index for index, marker in enumerate(MARKERS)}

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of everything that decides an encoding."""
        return hashlib.sha256(f"{self.name}:{_FIRST_BYTE}:{','.join(MARKERS)}".encode()).hexdigest()

    def template_digest(self, config: DataConfig) -> str:
        """Return the sha256 (64 hex) of what decides the rendering."""
        return byte_template.template_digest(config.include_steps)

    def encode_example(self, example: Example, config: DataConfig) -> Encoded:
        """Return the ids of a whole example, and which are trained on."""
        return Encoded(
            *self.encode(byte_template.render(example, include_steps=config.include_steps))
        )

    def encode_prompt(self, example: Example, config: DataConfig) -> Ids:
        """Return the ids of everything before the completion."""
        return self.encode(
            byte_template.render_prompt(example, include_steps=config.include_steps)
        )[0]

    def encode(self, segments: Iterable[Segment]) -> tuple[Ids, Mask]:
        """Return the ids [n] of segments and the mask [n] of those that are trained on."""
        ids: list[int] = []
        trained: list[bool] = []
        for segment in segments:
            if segment.is_marker:
                part = [self._ids[segment.text]]
            else:
                part = [_FIRST_BYTE + byte for byte in segment.text.encode("utf-8")]
            ids.extend(part)
            trained.extend([segment.trained] * len(part))
        return np.array(ids, np.int32), np.array(trained, np.bool_)

    def read_answer(self, ids: Sequence[int] | Ids, *, marked: bool = False) -> str | None:
        """Return what follows the last answer marker; without one see :func:`answers.read_answer`.

        The marker is a token, so `marked` is of no matter.
        """
        answer = answers.answer_ids([int(i) for i in ids], self._ids[ANSWER], self.eos_id)
        if answer is not None:
            return self.decode(answer).strip() or None
        return answers.read_answer(self.decode(ids), marked=False)

    def decode(self, ids: Sequence[int] | Ids, *, skip_special_tokens: bool = True) -> str:
        """Return the text, invalid UTF-8 replaced by U+FFFD.

        Without `skip_special_tokens` markers are spelled out. With it, that of an answer is written
        as pretrained models do (:data:`answers.ANSWER_MARK`), and the others are left out.
        """
        parts: list[str] = []
        pending = bytearray()
        for token in (int(i) for i in ids):
            if token >= _FIRST_BYTE:
                pending.append(token - _FIRST_BYTE)
                continue
            parts.append(pending.decode("utf-8", errors="replace"))
            pending.clear()
            spelled = MARKERS[token] if token < len(MARKERS) else f"<{token}>"
            if skip_special_tokens and spelled == ANSWER:
                parts.append(f"\n{answers.ANSWER_MARK} " if any(parts) else "")
            elif not skip_special_tokens:
                parts.append(spelled)
        parts.append(pending.decode("utf-8", errors="replace"))
        return "".join(parts)
