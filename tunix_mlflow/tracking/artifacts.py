"""Files that a URI of MLflow's names, as a folder here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from mlflow.exceptions import MlflowException

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ModelError
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.download import download_uri

_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")


def anchored(config: Config) -> Config:
    """A configuration whose `base` means the same in every folder."""
    if config.base is None or config.base.startswith(_SCHEMES):
        return config
    return msgspec.structs.replace(config, base=str(Path(config.base).expanduser().absolute()))


@contextmanager
def local(place: str) -> Iterator[Path]:
    """A path as it is, or a copy of what runs:/, models:/ or mlflow-artifacts:/ names.

    Yields:
        The path; a copy lies below the state root, for the length of the block.

    Raises:
        TrackingError: if it is not there.
        UnavailableError: if it cannot be fetched.
        ModelError: if it is a model that was logged.
    """
    if not place.startswith(_SCHEMES):
        yield Path(place).expanduser()
        return
    with files.scratch(paths.temporary_dir()) as scratch:
        try:
            found = download_uri(place, scratch)
        except (MlflowException, OSError) as error:
            what = f"cannot fetch {place}"
            raise store.failure(error, what, what) from error
        if (found / "MLmodel").is_file() and not (found / "config.json").is_file():
            raise ModelError(
                f"{place} is a logged model, not a folder in Hugging Face's layout: write it as one"
                " with `tunix-mlflow models export`"
            )
        yield found


@contextmanager
def base(config: Config) -> Iterator[Base | None]:
    """The pretrained model that a configuration names; None where it names none.

    Raises:
        ModelError: if it cannot be used.
        TrackingError: if it is not there.
        UnavailableError: if it cannot be fetched.
    """
    if config.base is None:
        yield None
        return
    with local(config.base) as place:
        yield bases.find(place)
