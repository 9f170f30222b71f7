"""What all contenders are given: documents of token ids, weights to begin with, a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_TASK, _ARRAYS = "task.json", "arrays.npz"


class Task(NamedTuple):
    """One comparison's work, as a folder holds it."""

    model: dict[str, Any]  # layers, width, heads, kv_heads, head_dim, mlp_width, rope_theta, ...
    vocab_size: int
    length: int  # tokens of a row
    batch_size: int  # rows of an update
    learning_rate: float
    b1: float
    b2: float
    weight_decay: float  # on matrices
    clip_norm: float
    threads: int
    stops: list[int]  # numbers of updates after which a contender pauses
    documents: list[npt.NDArray[np.int32]]  # each of 2 to `length` tokens
    order: npt.NDArray[np.int32]  # [updates, batch_size]: documents of an update, one a row
    weights: dict[
        str, npt.NDArray[np.float32]
    ]  # Llama's names and shapes, as transformers has them

    @property
    def steps(self) -> int:
        """Updates in all: one more, so that the last pause is like the others."""
        return self.stops[-1] + 1


def write(folder: Path, task: Task) -> None:
    """Write the folder."""
    words = task._asdict()
    documents, order = words.pop("documents"), words.pop("order")
    weights = words.pop("weights")
    np.savez(
        folder / _ARRAYS,
        order=order,
        tokens=np.concatenate(documents),
        lengths=np.asarray([len(d) for d in documents]),
        **{f"weights/{name}": array for name, array in weights.items()},
    )
    (folder / _TASK).write_text(json.dumps(words))


def read(folder: Path) -> Task:
    """Read what :func:`write` wrote."""
    with np.load(folder / _ARRAYS) as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        prefix = "weights/"
        return Task(
            **json.loads((folder / _TASK).read_text()),
            documents=np.split(arrays["tokens"], cuts),
            order=arrays["order"],
            weights={n.removeprefix(prefix): arrays[n] for n in arrays if n.startswith(prefix)},
        )


def padded(task: Task, step: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Tokens [B, T] of update `step`, from 0, one document a row; and which are not padding."""
    tokens = np.zeros((task.batch_size, task.length), np.int32)
    real = np.zeros(tokens.shape, np.bool_)
    for row, number in enumerate(task.order[step]):
        document = task.documents[number]
        tokens[row, : len(document)] = document
        real[row, : len(document)] = True
    return tokens, real
