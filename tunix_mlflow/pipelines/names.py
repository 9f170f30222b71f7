"""Names that pipelines give."""

from __future__ import annotations

from pathlib import Path

from tunix_mlflow.config.schema import Config


def model_name(config: Config, dataset: str, step: int) -> str:
    """Return a telling name for a logged model: base, LoRA, dataset and step."""
    parts = [Path(config.base).name if config.base else ""]
    parts += [f"lora{config.lora.rank}" if config.lora.rank else "", dataset, f"step{step}"]
    name = "-".join(part for part in parts if part)
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:200]
