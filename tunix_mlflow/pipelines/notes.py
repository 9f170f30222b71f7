"""The Markdown note on a run's page: what it did, on what data, what to do next."""

from __future__ import annotations

from collections.abc import Mapping

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest


def training(config: Config, manifest: Manifest, run_id: str, link: str) -> str:
    """Return the note of a training run."""
    splits = ", ".join(f"{name} {split.count:,}" for name, split in manifest.splits.items())
    target = "reasoning steps and answer" if config.data.include_steps else "the answer alone"
    return "\n".join(
        [
            f"**Training** on `{manifest.key}` ({splits}), {target}.",
            "",
            f"- dataset digest `{manifest.digest}`",
            f"- {config.training.steps} steps of {config.training.batch_size} rows,"
            f" {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
            "- configuration: artifact `config.json`; metrics as written: `metrics.jsonl`",
            f"- if it was interrupted: `tunix-mlflow resume {run_id}`",
            f"- to evaluate it: `tunix-mlflow evaluate {run_id} --dataset {manifest.key}`",
            f"- [this run]({link})",
        ]
    )


def of_model(what: str, model_id: str, training_link: str | None) -> str:
    """Return the note of a run that used a model: an evaluation or a promotion."""
    source = f", from [its training run]({training_link})" if training_link else ""
    return f"**{what}** of model `{model_id}`{source}."


def main(figures: Mapping[str, str], links: Mapping[str, str]) -> str:
    """Return the note of a run of all stages: its figures, and a link to each stage."""
    lines = ["**All stages**: " + ", ".join(f"[{stage}]({link})" for stage, link in links.items())]
    lines += ["", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join(lines)
