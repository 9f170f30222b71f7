"""The dataset-source plugin: where a run's examples come from, by digest.

Imported by every `import mlflow`; pyarrow and the snapshot code load when asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow.data.dataset_source import DatasetSource

if TYPE_CHECKING:
    from tunix_mlflow.data.examples import Example


class TunixMlflowDatasetSource(DatasetSource):
    """One split of a dataset.

    Args:
        key: the manifest's key, for people.
        digest: the dataset's digest, 64 hex, which names the snapshot.
        split: the split's name; None for all of it.
    """

    def __init__(self, key: str, digest: str, split: str | None) -> None:
        self.key, self.digest, self.split = key, digest, split

    @staticmethod
    def _get_source_type() -> str:
        return "tunix_mlflow"

    def load(self) -> list[Example]:
        """Return the examples of the split, checked against the digest.

        Raises:
            DatasetError: if this machine's state root has no such snapshot.
            IntegrityError: if its content is not what the digest says.
        """
        from tunix_mlflow.data import snapshot

        return snapshot.read(self.digest, self.split)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, TunixMlflowDatasetSource)

    @classmethod
    def _resolve(cls, raw_source: Any) -> TunixMlflowDatasetSource:
        if not isinstance(raw_source, TunixMlflowDatasetSource):
            raise TypeError(f"not a tunix_mlflow dataset source: {raw_source!r}")
        return raw_source

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as the run stores it."""
        return {"key": self.key, "digest": self.digest, "split": self.split}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> TunixMlflowDatasetSource:
        """Return what :meth:`to_dict` was made from."""
        return cls(source_dict["key"], source_dict["digest"], source_dict["split"])
