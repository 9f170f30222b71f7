"""The MLflow flavor `tunix_mlflow`: Orbax arrays and JSON, a signature, never code or pickle.

`mlflow models predict|serve --env-manager local` load it where tunix-mlflow is installed;
a model's requirements name this version.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from tunix_mlflow import files, paths
from tunix_mlflow.data import canonical
from tunix_mlflow.errors import IntegrityError
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.download import download_uri
from tunix_mlflow.tracking.models import serving
from tunix_mlflow.version import __version__

if TYPE_CHECKING:
    from tunix_mlflow.models.bundle import Bundle

FLAVOR = "tunix_mlflow"
MAX_NEW_TOKENS = 8192
_DATA = "bundle"
_LOADER = "tunix_mlflow.tracking.models.flavor"
_ROWS = 64  # prompts generated at a time

COLUMNS = ("text", "answer", "finish_reason", "error")
# No schema of inputs: with one, MLflow drops what it does not name, and a row comes back as none.
SIGNATURE = ModelSignature(
    outputs=Schema([ColSpec(DataType.string, name, required=False) for name in COLUMNS]),
    params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, 0)]),
)


def save_model(
    path: str,
    bundle: Path,
    weights_digest: str,
    input_example: pd.DataFrame,
    mlflow_model: Model | None = None,
) -> None:
    """Write a bundle in MLflow's model format.

    Args:
        path: a folder that does not exist.
        bundle: the folder that `models.bundle.save` wrote; its files are linked where possible.
        weights_digest: of its weights.
        input_example: a frame with the column `prompt`.
        mlflow_model: completed and written as the file MLmodel.
    """
    folder = Path(path)
    shutil.copytree(bundle, folder / _DATA, copy_function=_link)
    extra = "[pretrained]" if (bundle / "tokenizer").is_dir() else ""
    requirement = f"tunix-mlflow{extra}=={__version__}"
    (folder / "requirements.txt").write_text(f"{requirement}\n")
    version = ".".join(str(part) for part in sys.version_info[:3])
    (folder / "python_env.yaml").write_text(
        f"python: {version}\ndependencies:\n- -r requirements.txt\n"
    )
    model = mlflow_model or Model()
    model.signature = SIGNATURE
    _save_example(model, input_example, path)
    pyfunc.add_to_model(
        model,
        loader_module=_LOADER,
        data=_DATA,
        python_env="python_env.yaml",
    )
    model.add_flavor(
        FLAVOR,
        data=_DATA,
        version=__version__,
        weights_digest=weights_digest,
    )
    model.save(str(folder / MLMODEL_FILE_NAME))


def save_package(
    folder: Path,
    bundle: Path,
    *,
    model_id: str,
    location: str,
    run_id: str,
    prompts: Sequence[str],
    weights_digest: str,
) -> str:
    """Write the files of a logged model into a new folder.

    Args:
        folder: replaced if it exists.
        bundle: the folder that `models.bundle.save` wrote.
        model_id: the logged model.
        location: its artifact location.
        run_id: the run that made it.
        prompts: an input example.
        weights_digest: of its weights.

    Returns:
        The package digest of what was written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = Model(artifact_path=location, model_uuid=model_id, run_id=run_id, model_id=model_id)
    save_model(str(folder), bundle, weights_digest, pd.DataFrame({"prompt": list(prompts)}), model)
    return package_digest(folder)


def package_digest(folder: Path) -> str:
    """Return the sha256 (64 hex) over the sorted relative paths and sha256 of every file.

    MLmodel and requirements are among them: equal packages, equal digest. The file that MLflow
    writes beside them when it loads a model by its registered name is not.
    """
    hasher = hashlib.sha256()
    for path in sorted(path.relative_to(folder).as_posix() for path in _files(folder)):
        hasher.update(f"{path}\0{files.sha256_file(folder / path)}\n".encode())
    return hasher.hexdigest()


def content_digest(bundle: Path) -> str:
    """Return the content digest of a saved bundle, as `models.bundle.content_digest` does.

    It is over weights, tokenizer, template and limits. The weights are not read: bundle.json has
    their digest.
    """
    described = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    return canonical.digest(canonical.encode(described))


@contextmanager
def fetch_package(model_uri: str) -> Iterator[Path]:
    """Download a model of this flavor below the state root, for the length of a block.

    Yields:
        The folder with all of its files.

    Raises:
        TrackingError: if it is not there.
        UnavailableError: if it cannot be fetched.
        IntegrityError: if it is of another flavor, or would be served by other code.
    """
    with files.scratch(paths.temporary_dir()) as scratch:
        try:
            folder = download_uri(model_uri, scratch)
            check_flavor(folder, model_uri)
        except (MlflowException, OSError) as error:
            what = f"cannot load {model_uri}"
            raise store.failure(error, what, what) from error
        yield folder


def check_flavor(package: Path, model_uri: str) -> None:
    """Check that the files of a model are of this flavor, by its MLmodel.

    Raises:
        OSError: if there is none.
        IntegrityError: if it is damaged, of another flavor, or would be served by other code.
    """
    try:
        # Not by Model.load, which takes a path for an address, and decodes it.
        flavors = yaml.safe_load((package / MLMODEL_FILE_NAME).read_bytes())["flavors"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise IntegrityError(f"{model_uri} has a damaged MLmodel") from error
    if FLAVOR not in flavors:
        names = ", ".join(flavors)
        raise IntegrityError(f"{model_uri} is not a tunix_mlflow model but {names}")
    served = flavors.get("python_function", {})
    if served.get("loader_module") != _LOADER or "code" in served:
        raise IntegrityError(f"{model_uri} would be served by code that is not tunix_mlflow's")


def bundle_folder(package: Path) -> Path:
    """Return the bundle in the files of a model."""
    return package / _DATA


def load_model(model_uri: str) -> Bundle:
    """Load a model of this flavor, checked file by file.

    Raises:
        TrackingError: if it is not there.
        UnavailableError: if it cannot be fetched.
        IntegrityError: if it is of another flavor, or damaged.
    """
    from tunix_mlflow.models import bundle as bundles

    with fetch_package(model_uri) as package:
        return bundles.load(bundle_folder(package))


class _Pyfunc:
    """The object that `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Complete each row, which :func:`serving.examples` reads.

        Returns:
            As many rows: text, answer, finish_reason (stop or length), and an error in place of
            them for a row that cannot be completed. What is not there is null.
        """
        limit = int((params or {}).get("max_new_tokens") or 0)
        if not 0 <= limit <= MAX_NEW_TOKENS:
            raise MlflowException.invalid_parameter_value(
                f"max_new_tokens is {limit}; expected 0 (the model's own) to {MAX_NEW_TOKENS}"
            )
        rows = serving.examples(data)
        results: list[dict[str, str | None]] = [
            dict.fromkeys(COLUMNS) | {"error": row if isinstance(row, str) else None}
            for row in rows
        ]
        asked = [(n, row) for n, row in enumerate(rows) if not isinstance(row, str)]
        for start in range(0, len(asked), _ROWS):
            part = asked[start : start + _ROWS]
            done = self._bundle.complete([example for _, example in part], limit or None)
            for (number, _), completion in zip(part, done, strict=True):
                results[number] = completion._asdict()
        return pd.DataFrame(results, columns=list(COLUMNS), dtype=object)


def _files(folder: Path) -> list[Path]:
    written_by_loading = folder / REGISTERED_MODEL_META_FILE_NAME
    return [path for path in folder.rglob("*") if path.is_file() and path != written_by_loading]


def _link(source: str, target: str) -> None:
    """Link a file, which takes no space; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _load_pyfunc(path: str) -> _Pyfunc:
    from tunix_mlflow.models import bundle as bundles

    return _Pyfunc(bundles.load(Path(path)))
