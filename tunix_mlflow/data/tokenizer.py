"""A byte tokenizer: one id a UTF-8 byte, and one a marker of the conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tunix_mlflow.data.chat import ANSWER, BOS, EOS, ROLE_MARKERS, Segment

PAD = "<pad>"
MARKERS = (PAD, BOS, EOS, ANSWER, *ROLE_MARKERS.values())
_FIRST_BYTE = 16  # ids below are kept for markers


class ByteTokenizer:
    """Every text round-trips; markers are ids, so no text can imitate one."""

    name = "bytes-v1"
    vocab_size = _FIRST_BYTE + 256
    pad_id = 0
    eos_id = MARKERS.index(EOS)

    def __init__(self) -> None:
        self._ids = {marker: number for number, marker in enumerate(MARKERS)}

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of everything that decides an encoding."""
        return hashlib.sha256(f"{self.name}:{_FIRST_BYTE}:{','.join(MARKERS)}".encode()).hexdigest()

    def encode(
        self, segments: Iterable[Segment]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
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

    def answer(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> str | None:
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

    def decode(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
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
