"""The dataset-constructor plugin: `mlflow.data.from_tunix_mlflow("golden-v2")`.

Imported by every `import mlflow`; the catalog and pyarrow load when it is called. The return
annotation has to be a class, so annotations are not postponed here.
"""

from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset


def from_tunix_mlflow(
    key: str, split: str | None = None, name: str | None = None, digest: str | None = None
) -> TunixMlflowDataset:
    """Return a split of a dataset in the catalog, for `mlflow.log_input`.

    Args:
        key: of the dataset, NAME-vN, or its digest (64 hex) where there is a snapshot.
        split: its split; None for all of it.
        name: shown in MLflow; None for `key/split`.
        digest: the digest it must have, or the beginning of it; None for any.

    Raises:
        DatasetError: if there is no such dataset or split, or it has another digest.
        Refused: if the catalog does not hold what the manifest says.
    """
    from tunix_mlflow.data import datasets
    from tunix_mlflow.errors import DatasetError

    manifest = datasets.ready(key, lambda message: None)
    if split is not None and split not in manifest.splits:
        raise DatasetError(
            f"dataset {key} has no split {split!r}; it has {', '.join(manifest.splits)}"
        )
    dataset = TunixMlflowDataset(manifest, split, name)
    if digest is not None and not dataset.full_digest.startswith(digest):
        raise DatasetError(f"{dataset.name} has the digest {dataset.full_digest}, not {digest}")
    return dataset
