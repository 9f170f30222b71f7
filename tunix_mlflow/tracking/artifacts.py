"""Files that a URI of MLflow's names, as a folder here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from mlflow.exceptions import MlflowException

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ModelError, TrackingError
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import download as hub
from tunix_mlflow.models.hub import export
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.download import download_uri
from tunix_mlflow.tracking.models import flavor, registry

_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")


def anchored(config: Config) -> Config:
    """A configuration whose `base` means the same in every folder, and at every time.

    A registered model is named by the logged model that its version or alias stands for now, a
    model on a hub by the commit.
    """
    if config.base is not None and config.base.startswith(hub.SCHEME):
        return msgspec.structs.replace(config, base=hub.download(config.base).uri)
    if config.base is None or config.base.startswith(_SCHEMES):
        return config if config.base is None else _of_logged_model(config, config.base)
    return msgspec.structs.replace(config, base=str(Path(config.base).expanduser().absolute()))


def _of_logged_model(config: Config, base: str) -> Config:
    if not base.startswith("models:/") or base.startswith("models:/m-"):
        return config
    try:
        logged = registry.resolve(store.connect(config.tracking), base)
    except TrackingError:  # a folder that was registered as it is
        return config
    return msgspec.structs.replace(config, base=f"models:/{logged.model_id}")


@contextmanager
def local(place: str) -> Iterator[Path]:
    """A path as it is, or a copy of what runs:/, models:/, mlflow-artifacts:/ or hf:// names.

    Of a model that was logged the copy is in Hugging Face's layout, with adapters merged.

    Yields:
        The path; a copy lies below the state root, for the length of the block.

    Raises:
        TrackingError: if it is not there.
        UnavailableError: if it cannot be fetched.
        IntegrityError: if it is a damaged model.
        ModelError: if it is a model whose tokens are bytes.
    """
    if place.startswith(hub.SCHEME):
        yield hub.download(place).folder
        return
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
            found = _as_folder(found, scratch / "base", place)
        yield found


def _as_folder(package: Path, folder: Path, place: str) -> Path:
    """Write the files of a logged model in Hugging Face's layout; return the folder."""
    flavor.check_flavor(package, place)
    bundle = bundles.load(flavor.bundle_folder(package))
    if not bundle.tokenizer.files:
        raise ModelError(
            f"{place} was trained from scratch, on bytes: it is no base for others. To train it"
            " further, also on other data, begin a run at its checkpoint: `tunix-mlflow resume RUN"
            " --fork dataset=KEY`"
        )
    export.merged(bundle, folder)
    return folder


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
