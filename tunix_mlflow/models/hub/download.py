"""Models and datasets by their names on a hub: hf://OWNER/NAME@REVISION.

Files come through huggingface_hub's cache, which is used as it is when the hub cannot be reached.
HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are its own; nothing of them is recorded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tunix_mlflow.errors import DatasetError, ModelError, UnavailableError
from tunix_mlflow.files import one_line

SCHEME = "hf://"
_DATASETS = "datasets/"
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
_DATA_FILES = tuple(
    f"*{kind}{codec}"
    for kind in (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
    for codec in ("", ".gz", ".zst", ".bz2", ".xz")
)


class Downloaded(NamedTuple):
    """A repository's files here."""

    folder: Path
    uri: str  # with the commit that the revision stood for


def download(uri: str) -> Downloaded:
    """Fetch what is needed of a repository: weights and tokenizer, or the files of a dataset.

    Args:
        uri: `hf://OWNER/NAME`, or `hf://datasets/OWNER/NAME`, with `@REVISION` or without.

    Raises:
        ModelError, DatasetError: if the name is none, or there is no such repository or revision.
        UnavailableError: if the hub cannot be reached, and the cache does not have all of it.
    """
    named = uri.removeprefix(SCHEME)
    is_data = named.startswith(_DATASETS)
    wrong = DatasetError if is_data else ModelError
    name, at, revision = named.removeprefix(_DATASETS if is_data else "").partition("@")
    if not _NAME.fullmatch(name) or (at and not _REVISION.fullmatch(revision)):
        raise wrong(f"{uri}: expected hf://[datasets/]OWNER/NAME or ...@REVISION")
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError as error:
        raise wrong(
            f"{uri} cannot be fetched: no package {error.name}; install the extra `pretrained`:"
            " pip install 'tunix-mlflow[pretrained]'"
        ) from error
    try:
        folder = snapshot_download(
            name,
            repo_type="dataset" if is_data else "model",
            revision=revision or None,
            allow_patterns=list(_DATA_FILES if is_data else _MODEL_FILES),
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise wrong(
            f"{uri}: there is no such repository or revision, or HF_TOKEN does not allow it"
        ) from error
    except Exception as error:  # of the client below it, of the disk, of the hub's answer
        raise UnavailableError(f"cannot fetch {uri}: {one_line(error, 300)}") from error
    path = Path(str(folder))
    return Downloaded(path, f"{SCHEME}{_DATASETS if is_data else ''}{name}@{path.name}")
