"""This project's own loop, without tracking: `python -m ... FOLDER CONFIG.json PACKING`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunix_mlflow.runtime import huge_pages

_COMPILING = "backend_compile"  # an event of jax.monitoring, from the cache too


def main(folder: Path, config_file: Path, packing: bool) -> None:
    """Train the task."""
    from tunix_mlflow.config.load import from_json
    from tunix_mlflow.runtime.environment import prepare

    config = from_json(config_file.read_bytes(), str(config_file))
    prepare(config)

    import jax
    import numpy as np

    from tunix_mlflow.benchmarks import workload
    from tunix_mlflow.benchmarks.contenders import task as tasks
    from tunix_mlflow.benchmarks.contenders.pace import Pace
    from tunix_mlflow.input.batches import TrainBatches
    from tunix_mlflow.models import decoder
    from tunix_mlflow.models.hub import names
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.training import loop, setup, step
    from tunix_mlflow.training.checkpoint import Checkpoints, Retention

    task = tasks.read(folder)
    pace = Pace(task.stops, lambda: jax.block_until_ready(jax.live_arrays()))

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if _COMPILING in event:
            pace.compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    device = devices.use(config.device)
    config = setup.resolve_auto(config, task.vocab_size, device.platform)
    spec = setup.step_spec(config, task.vocab_size, device)
    compiled = setup.compile_ahead(spec, config, task.vocab_size, device)
    params = names.from_names(
        {name: array.shape for name, array in task.weights.items()},
        task.weights.pop,
        decoder.shape(config.model, task.vocab_size)[1],
        config.model,
        "the task",
        lambda array, _: jax.device_put(array, device),
    )
    state = setup.fresh(spec, params, device)
    del params
    rows = workload.rows(task.documents, task.length, packing=packing)
    asked = 0

    def paced(state: Any, batch: Any, *more: Any, **named: Any) -> Any:
        nonlocal asked
        pace.done(asked)
        asked += 1
        pace.useful(asked, int(np.count_nonzero(batch.segments)))
        return step.train_step(state, batch, *more, **named)

    vars(loop)["train_step"] = paced  # the loop is the real one; its steps wait their turn

    class Losses:
        """Hands losses to the benchmark."""

        def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
            if "train/loss" in scalars:
                pace.loss(step, scalars["train/loss"])

        def flush(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch), {}, retention=Retention(1))
        loop.fit(
            config,
            state,
            TrainBatches(rows, batch_size=task.batch_size, seed=config.seed),
            spec=spec,
            writers=[Losses()],
            checkpoints=checkpoints,
            evaluate=None,
            compiled=compiled,
        )
        checkpoints.close()
    pace.end()


if __name__ == "__main__":
    huge_pages.restart()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "packed")
