"""Generate a built-in dataset into the catalog, and record it as an input of a run."""

from __future__ import annotations

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets, seeds
from tunix_mlflow.data.datasets import Built
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.run import open_run


@store.restored()
def seed(
    key: str,
    *,
    num_traces: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    config: Config | None = None,
    reporter: Reporter = SILENT,
) -> Built:
    """Generate a dataset, store it, and record it; the same one twice changes nothing.

    Args:
        key: the built-in dataset, for example golden-v2.
        num_traces: how many; None: its own number.
        seed: the random seed; None: 42.
        name: the key to store it under; None: `key`.
        config: `tracking` is read; None: the defaults.
        reporter: receives messages.

    Raises:
        DatasetError: for an unknown seed, or a key that names another dataset.
    """
    config = config or Config()
    store.connect(config.tracking)  # a dead server fails before anything is stored
    built = datasets.seed(key, num_traces=num_traces, seed=seed, name=name)
    manifest = built.manifest
    reporter.info(
        f"{manifest.key}: {manifest.count:,} examples,"
        f" {manifest.stats['distinct_prompts']:,} distinct prompts,"
        f" {'stored' if built.created else 'identical to what is there'}"
    )
    with open_run(
        stage="seed",
        tracking=config.tracking,
        name=config.tracking.run_name or f"seed {manifest.key}",
        tags={
            "tunix_mlflow.dataset": manifest.key,
            "tunix_mlflow.dataset_digest": manifest.digest,
        },
        report=reporter.info,
    ) as run:
        run.log_params(
            {
                "dataset": manifest.key,
                "num_traces": manifest.request["num_traces"],
                "seed": seeds.DEFAULT_SEED if seed is None else seed,
                "examples": manifest.count,
                **manifest.stats,
            }
        )
        for split in manifest.splits:
            run.log_input(TunixMlflowDataset(manifest, split), context="seed")
    return built
