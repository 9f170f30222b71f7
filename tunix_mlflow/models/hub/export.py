"""Export a trained model: as a folder for transformers, or as an adapter for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tunix_mlflow.errors import ModelError
from tunix_mlflow.models.bundle import Bundle
from tunix_mlflow.models.hub import names, pretrained
from tunix_mlflow.text.hub_tokenizer import GENERATION

_PEFT = "base_model.model."


def merged(bundle: Bundle, folder: Path, dtype: str = "float32") -> None:
    """Write config.json, weights, tokenizer and template, with adapters merged.

    Raises:
        ModelError: if the folder exists.
    """
    tokenizer = bundle.tokenizer
    ends: Any = tokenizer.eos_ids[0] if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)
    files = dict(tokenizer.files)
    if files:  # transformers reads the end of a completion from here first
        generation = json.loads(files.get(GENERATION, b"{}")) | {"eos_token_id": ends}
        files[GENERATION] = json.dumps(generation, indent=2, sort_keys=True).encode()
    pretrained.save(
        folder,
        bundle.config,
        bundle.params,
        files=files,
        tokens={"eos_token_id": ends, "pad_token_id": tokenizer.pad_id},
        dtype=dtype,
    )


def adapter(bundle: Bundle, folder: Path, dtype: str = "float32") -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT reads them.

    Raises:
        ModelError: if the model has no adapter, or the folder exists.
    """
    from safetensors.numpy import save_file

    if bundle.adapter is None:
        raise ModelError("this model was trained without LoRA: it has no adapter")
    trained = bundle.adapter
    tensors = {}
    for name, leaf in names.named(trained.params, bundle.config).items():
        tensors[f"{_PEFT}{name}"] = np.ascontiguousarray(np.asarray(leaf).T, dtype)
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trained.base,
        "r": trained.config.rank,
        "lora_alpha": trained.config.alpha,
        "lora_dropout": trained.config.dropout,
        "target_modules": sorted(trained.config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with pretrained.new_folder(folder) as scratch:
        text = json.dumps(adapter_config, indent=2, sort_keys=True)
        (scratch / "adapter_config.json").write_text(f"{text}\n")
        save_file(
            tensors, scratch / "adapter_model.safetensors", {"base_digest": trained.base_digest}
        )
