"""Download artifacts without MLflow's progress bars, which a library must not print.

MLflow's own functions also write a file of their own beside the files of a model.
"""

from __future__ import annotations

from pathlib import Path

from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path


def download_uri(uri: str, folder: Path) -> Path:
    """Download what runs:/, models:/ or mlflow-artifacts:/ names into a folder.

    Returns:
        The path of the file or the folder that was named.

    Raises:
        MlflowException: if it is not there, or MLflow does not answer.
        OSError: if it cannot be written.
    """
    root, path = _get_root_uri_and_artifact_path(uri)
    return _download(get_artifact_repository(root), path, folder)


def download_artifact(client: MlflowClient, run_id: str, path: str, folder: Path) -> Path:
    """Download an artifact of a run, or a folder of them, into a folder; see `download_uri`."""
    return _download(
        get_artifact_repository(client.get_run(run_id).info.artifact_uri), path, folder
    )


def _download(repository: ArtifactRepository, path: str, folder: Path) -> Path:
    entries = repository.list_artifacts(path or None)
    if path and not entries:  # a file, or nothing; the repository says which
        _download_file(repository, path, folder)
    else:
        (folder / path).mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry.is_dir:
            _download(repository, entry.path, folder)
        else:
            _download_file(repository, entry.path, folder)
    return folder / path


def _download_file(repository: ArtifactRepository, path: str, folder: Path) -> None:
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):  # what a server lists is not trusted
        raise OSError(f"the artifact path {path!r} leads out of its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    repository._download_file(path, str(target))
