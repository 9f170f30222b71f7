"""What every trainer is given: documents of token ids, initial weights, a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_TASK, _ARRAYS = "task.json", "arrays.npz"


class Task(NamedTuple):
    """The work of one comparison; it is stored as a folder."""

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
    stops: list[int]  # a trainer pauses after these numbers of updates
    documents: list[npt.NDArray[np.int32]]  # each of 2 to `length` tokens
    order: npt.NDArray[np.int32]  # [updates, batch_size]: documents of an update, one a row
    weights: dict[
        str, npt.NDArray[np.float32]
    ]  # Llama's names and shapes, as transformers has them

    @property
    def steps(self) -> int:
        """Updates in all: one more than the last stop, so that its pause is like the others."""
        return self.stops[-1] + 1


def write(folder: Path, task: Task) -> None:
    """Write the folder."""
    fields = task._asdict()
    documents, order = fields.pop("documents"), fields.pop("order")
    weights = fields.pop("weights")
    np.savez(
        folder / _ARRAYS,
        order=order,
        tokens=np.concatenate(documents),
        lengths=np.asarray([len(d) for d in documents]),
        **{f"weights/{name}": array for name, array in weights.items()},
    )
    (folder / _TASK).write_text(json.dumps(fields))


def read(folder: Path) -> Task:
    """Read what :func:`write` wrote."""
    with np.load(folder / _ARRAYS) as arrays:
        boundaries = np.cumsum(arrays["lengths"])[:-1]
        prefix = "weights/"
        return Task(
            **json.loads((folder / _TASK).read_text()),
            documents=np.split(arrays["tokens"], boundaries),
            order=arrays["order"],
            weights={n.removeprefix(prefix): arrays[n] for n in arrays if n.startswith(prefix)},
        )


def padded(task: Task, step: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return tokens and a mask of those that are not padding, of update `step`, from 0.

    Both are [B, T], one document per row.
    """
    tokens = np.zeros((task.batch_size, task.length), np.int32)
    real = np.zeros(tokens.shape, np.bool_)
    for row, index in enumerate(task.order[step]):
        document = task.documents[index]
        tokens[row, : len(document)] = document
        real[row, : len(document)] = True
    return tokens, real
