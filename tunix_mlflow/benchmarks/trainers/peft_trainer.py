"""Google Tunix's PeftTrainer on its own Llama: `python -m ... FOLDER`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from safetensors.numpy import save_file
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as loader
from tunix.sft import hooks, peft_trainer, utils

from tunix_mlflow.benchmarks.trainers import task as tasks
from tunix_mlflow.benchmarks.trainers.pace import Pace


class _Losses(hooks.TrainingHooks):  # type: ignore[misc]
    """Hand losses to the benchmark; the trainer fetches them one step late."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_train_step_end(self, trainer: Any, train_step: int, train_loss: Any, *_: Any) -> None:
        self._pace.set_loss(train_step, float(train_loss))

    def on_train_start(self, trainer: Any) -> None: ...
    def on_train_end(self, trainer: Any) -> None: ...
    def on_train_step_start(self, trainer: Any) -> None: ...
    def on_eval_step_start(self, trainer: Any) -> None: ...
    def on_eval_step_end(self, *_: Any) -> None: ...


def main(folder: Path) -> None:
    """Train the task."""
    task = tasks.read(folder)
    pace = Pace(task.stops, lambda: jax.block_until_ready(jax.live_arrays()))
    shape = task.model
    config = llama.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=task.vocab_size,
        embed_dim=shape["width"],
        hidden_dim=shape["mlp_width"],
        num_heads=shape["heads"],
        head_dim=shape["head_dim"] or shape["width"] // shape["heads"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["norm_epsilon"],
        weight_tying=shape["tie_embeddings"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        weights = {n: np.ascontiguousarray(a) for n, a in task.weights.items()}
        save_file(weights, Path(scratch) / "model.safetensors")
        model = loader.create_model_from_safe_tensors(scratch, config)
    del weights
    task.weights.clear()
    optimizer = optax.chain(
        optax.clip_by_global_norm(task.clip_norm),
        optax.adamw(
            task.learning_rate,
            b1=task.b1,
            b2=task.b2,
            weight_decay=task.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
        ),
    )
    trainer = peft_trainer.PeftTrainer(
        model,
        optimizer,
        peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=task.steps),
    ).with_gen_model_input_fn(
        lambda batch: {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(batch.input_mask),
            "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
        }
    )
    trainer.with_training_hooks(_Losses(pace))

    def stream() -> Iterator[peft_trainer.TrainingInput]:
        for step in range(task.steps):
            pace.pause_after(step)
            tokens, real = tasks.padded(task, step)
            pace.set_useful_tokens(step + 1, int(real.sum()) - len(real))
            yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=real)

    trainer.train(stream())
    pace.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
