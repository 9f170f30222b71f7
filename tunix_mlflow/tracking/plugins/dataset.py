"""A split of a manifest as an MLflow dataset, one input of a run.

Imported by every `import mlflow`, through the constructor plugin.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mlflow.data.dataset import Dataset
from mlflow.types.schema import ColSpec, DataType, Schema

from tunix_mlflow.tracking.plugins.dataset_source import TunixMlflowDatasetSource

if TYPE_CHECKING:
    from tunix_mlflow.data.manifest import Manifest

_SCHEMA = Schema(
    [
        ColSpec(DataType.string, "messages"),
        ColSpec(DataType.string, "steps"),
        ColSpec(DataType.string, "answer"),
        ColSpec(DataType.string, "split"),
        ColSpec(DataType.string, "meta"),
    ]
)


class TunixMlflowDataset(Dataset):
    """A dataset, or one split of it.

    MLflow shows its name, `key/split`, its digest (the first 32 of 64 hex), schema and profile.

    Args:
        manifest: the dataset.
        split: None: all of it, by the dataset's digest.
        name: shown instead.
    """

    def __init__(self, manifest: Manifest, split: str | None, name: str | None = None) -> None:
        self.manifest, self.split = manifest, split
        source = TunixMlflowDatasetSource(manifest.key, manifest.digest, split)
        default = manifest.key if split is None else f"{manifest.key}/{split}"
        super().__init__(source, name=name or default)

    def _compute_digest(self) -> str:
        return self.full_digest[:32]

    @property
    def full_digest(self) -> str:
        """The digest of the split, or of the dataset; 64 hex."""
        if self.split is None:
            return self.manifest.digest
        return self.manifest.splits[self.split].digest

    @property
    def profile(self) -> dict[str, Any]:
        """Flat figures; the full digests are among them."""
        return {
            "examples": (
                self.manifest.count
                if self.split is None
                else self.manifest.splits[self.split].count
            ),
            "split_digest": self.full_digest,
            "dataset_examples": self.manifest.count,
            "dataset_digest": self.manifest.digest,
            **{f"dataset_{k}": v for k, v in self.manifest.stats.items()},
        }

    @property
    def schema(self) -> Schema:
        """The columns of an example; messages, steps and meta are JSON."""
        return _SCHEMA

    def to_dict(self) -> dict[str, str]:
        """Return what the run stores."""
        return super().to_dict() | {
            "schema": json.dumps({"mlflow_colspec": self.schema.to_dict()}),
            "profile": json.dumps(self.profile),
        }
