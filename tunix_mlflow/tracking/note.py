"""The Markdown note on a run's page: what, on what data, how to go on."""

from __future__ import annotations

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest


def training(config: Config, manifest: Manifest, run_id: str, link: str) -> str:
    """The note of a training run."""
    splits = ", ".join(f"{name} {split.count:,}" for name, split in manifest.splits.items())
    steps = "reasoning steps and answer" if config.data.include_steps else "the answer alone"
    return "\n".join(
        [
            f"**Training** on `{manifest.key}` ({splits}), {steps}.",
            "",
            f"- dataset digest `{manifest.digest}`",
            f"- {config.training.steps} steps of {config.training.batch_size} rows,"
            f" {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
            "- configuration: artifact `config.json`; metrics as written: `metrics.jsonl`",
            f"- if it was interrupted: `tunix-mlflow resume {run_id}`",
            f"- to score it: `tunix-mlflow evaluate {run_id} dataset={manifest.key}`",
            f"- [this run]({link})",
        ]
    )
