"""This project's own loop, without tracking: `python -m ... FOLDER CONFIG.json PACKING`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunix_mlflow.runtime import huge_pages

_COMPILE_EVENT = "backend_compile"  # of jax.monitoring, from the cache too


def main(folder: Path, config_file: Path, packing: bool) -> None:
    """Train the task."""
    from tunix_mlflow.config.load import from_json
    from tunix_mlflow.runtime import environment

    config = from_json(config_file.read_bytes(), str(config_file))
    environment.export(config)

    import jax
    import numpy as np

    from tunix_mlflow.benchmarks import workload
    from tunix_mlflow.benchmarks.trainers import task as tasks
    from tunix_mlflow.benchmarks.trainers.pace import Pace
    from tunix_mlflow.input.batches import Batch, TrainBatches
    from tunix_mlflow.models import decoder
    from tunix_mlflow.models.hub import names
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.training.loop import Callback, Loop, fit
    from tunix_mlflow.training.resolve import resolve_auto
    from tunix_mlflow.training.trainer import Trainer

    task = tasks.read(folder)
    pace = Pace(task.stops, lambda: jax.block_until_ready(jax.live_arrays()))

    def on_event(event: str, duration_secs: float, **_: Any) -> None:
        if _COMPILE_EVENT in event:
            pace.add_compile_seconds(duration_secs)

    class Paced(Callback):
        """Pause before updates, and hand tokens and losses to the benchmark."""

        def before_step(self, loop: Loop, batch: Batch) -> None:
            pace.pause_after(loop.step)
            pace.set_useful_tokens(loop.step + 1, int(np.count_nonzero(batch.segments)))

        def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
            if "train/loss" in metrics:
                pace.set_loss(step, metrics["train/loss"])

    jax.monitoring.register_event_duration_secs_listener(on_event)
    device = devices.use(config.device)
    config = resolve_auto(config, task.vocab_size, device.platform)
    params = names.from_names(
        {name: array.shape for name, array in task.weights.items()},
        task.weights.pop,
        decoder.shape(config.model, task.vocab_size)[1],
        config.model,
        "the task",
        lambda array, _: jax.device_put(array, device),
    )
    trainer = Trainer.create(config, task.vocab_size, device, params=params, compile_ahead=True)
    del params
    rows = workload.token_rows(task.documents, task.length, packing=packing)
    fit(trainer, TrainBatches(rows, batch_size=task.batch_size, seed=config.seed), [Paced()])
    pace.end()


if __name__ == "__main__":
    huge_pages.restart()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "packed")
