"""transformers' Trainer, or trl's SFTTrainer, on PyTorch: `python -m ... FOLDER KIND`.

KIND: `trainer`, `sft`, or `sft-packed`. With their defaults: rows are padded to the longest of the
batch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tunix_mlflow.benchmarks.trainers import task as tasks
from tunix_mlflow.benchmarks.trainers.pace import Pace
from tunix_mlflow.benchmarks.trainers.task import Task


class _Paced(transformers.TrainerCallback):  # type: ignore[misc]
    """Pause after a step, and hand losses to the benchmark."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pace.pause_after(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._pace.set_loss(state.global_step, logs["loss"])


def main(folder: Path, kind: str) -> None:
    """Train the task."""
    task = tasks.read(folder)
    torch.set_num_threads(task.threads)
    pace = Pace(task.stops, lambda: None)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(task, scratch) if kind == "trainer" else _sft(task, scratch, kind)
        trainer.add_callback(_Paced(pace))
        collate, batches = trainer.data_collator, 0

        def counted(rows: Any) -> Any:
            nonlocal batches
            batches += 1
            batch = collate(rows)
            pace.set_useful_tokens(batches, int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
    pace.end()


def _model(task: Task) -> Any:
    shape = task.model
    config = transformers.LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"] or shape["width"] // shape["heads"],
        max_position_embeddings=task.length,
        rms_norm_eps=shape["norm_epsilon"],
        rope_theta=shape["rope_theta"],
        tie_word_embeddings=shape["tie_embeddings"],
        use_cache=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(array.copy()) for name, array in task.weights.items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    task.weights.clear()
    assert not unknown
    assert set(missing) <= {"lm_head.weight"}
    return model


def _arguments(task: Task, scratch: str) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": task.b1,
        "adam_beta2": task.b2,
        "weight_decay": task.weight_decay,
        "max_grad_norm": task.clip_norm,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def _rows(task: Task) -> list[dict[str, list[int]]]:
    """Return the documents in the task's order, so that every trainer sees the same batches."""
    return [{"input_ids": task.documents[n].tolist()} for n in task.order.ravel()]


class _InOrder(transformers.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _trainer(task: Task, scratch: str) -> Any:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        real = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            real[index, : len(row["input_ids"])] = 1
        labels = torch.where(real == 1, ids, -100)
        return {"input_ids": ids, "attention_mask": real, "labels": labels}

    arguments = transformers.TrainingArguments(
        **_arguments(task, scratch), remove_unused_columns=False
    )
    return _InOrder(_model(task), arguments, collate, train_dataset=_rows(task))


def _sft(task: Task, scratch: str, kind: str) -> Any:
    import datasets
    import tokenizers
    import trl

    class InOrder(trl.SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    vocabulary = {f"<{n}>": n for n in range(task.vocab_size)}
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<0>", eos_token="<1>"
    )
    arguments = trl.SFTConfig(
        **_arguments(task, scratch),
        max_length=task.length,
        packing=kind == "sft-packed",
        gradient_checkpointing=False,
        dataset_num_proc=1,
    )
    return InOrder(
        _model(task),
        arguments,
        train_dataset=datasets.Dataset.from_list(_rows(task)),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
