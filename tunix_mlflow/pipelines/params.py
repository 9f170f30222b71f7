"""Which of a configuration's keys a run shows as MLflow params; `config.json` holds all of them."""

from __future__ import annotations

from typing import Any

from tunix_mlflow.config.identity import flatten, non_defaults
from tunix_mlflow.config.schema import Config

LIMIT = 29  # and the number of parameters
"""Params of ours, at most, on one run: what a table of runs can show."""
ALWAYS = (
    *("dataset", "base", "seed", "data.sequence_length", "model.layers", "model.width"),
    *("lora.rank", "optimizer.name", "optimizer.learning_rate"),
    *("training.steps", "training.batch_size", "training.microbatch_size"),
)
"""Keys that every training run shows, whether they were set or not."""
_CHOSEN = tuple(
    f"training.{name}" for name in ("microbatch_size", "scan_layers", "loss_chunk", "fused")
)
"""Keys that a run chooses where they are null."""
_OF_OTHERS = ("tracking.", "benchmark.", "promotion.", "limits.")


def training_params(given: Config, resolved: Config, *, resumed: bool = False) -> dict[str, Any]:
    """Return the params of a training run: the keys of ALWAYS, and what was set, at most LIMIT.

    Args:
        given: what the preset and the user set.
        resolved: what the run computes with; the values are taken from here.
        resumed: `given` is what the run recorded, with what it had chosen, and the run has its
            params.
    """
    values = flatten(resolved)
    chosen = [key for key in non_defaults(given) if not key.startswith(_OF_OTHERS)]
    if resumed:
        chosen = [key for key in chosen if key not in _CHOSEN]
    keys = list(dict.fromkeys([*ALWAYS, *chosen]))[:LIMIT]
    return {key: values[key] for key in keys if key in values}
