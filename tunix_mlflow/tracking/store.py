"""Reaching MLflow: the tracking store, the experiment, and links into the UI."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import FileInfo, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient, fluent
from mlflow.tracking._model_registry import utils as registry_uris
from mlflow.tracking._tracking_service import utils as tracking_uris

from tunix_mlflow import paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime.waiting import wait_for

DEFAULT_EXPERIMENT = "tunix-mlflow"
_KIND_TAG = {"mlflow.experimentKind": "custom_model_development"}
_PROBE_SECONDS = 4
_MIGRATION_SECONDS = 600
_MISTAKES = (
    *("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE", "BAD_REQUEST"),
    *("RESOURCE_ALREADY_EXISTS", "INVALID_STATE"),
)
_NOT_FOUND = 404
_EXPORTED = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")  # by MLflow, when it is given a store


def connect(config: TrackingConfig) -> MlflowClient:
    """Point this process at its tracking store, and find out at once whether it answers.

    Raises:
        UnavailableError: if it does not, after seconds; MLflow's own retries take minutes.
        TrackingError: for a store that cannot be used even when its server answers.
    """
    client, away = reach(config)
    if away is not None:
        raise UnavailableError(
            f"{away}; start it, set MLFLOW_TRACKING_URI, or record locally with"
            " tracking.offline=true"
        )
    return client


def reach(config: TrackingConfig) -> tuple[MlflowClient, str | None]:
    """Point this process at its tracking store.

    Returns:
        A client, and why the server does not answer; None if it does.

    Raises:
        TrackingError: for a store that cannot be used even when its server answers.
    """
    if config.offline:
        paths.offline_artifacts().mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(paths.offline_tracking_uri())
        mlflow.set_registry_uri(paths.offline_tracking_uri())
    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        away = _probe(uri)
        if away is not None:
            return MlflowClient(), away
    elif (file := paths.sqlite_path(uri)) is not None and file.is_dir():
        raise TrackingError(f"cannot use the MLflow store {uri}: it is a folder, not a database")
    try:
        with _alone(uri):
            client = MlflowClient()
            client.search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy's and the HTTP client's errors share no base
        hint = ""
        if "401" in str(error) or "403" in str(error):
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: "
        elif uri.startswith("http") and _is_away(error):
            return MlflowClient(), f"the MLflow server {public(uri)} fails: {one_line(error)}"
        kind = UnavailableError if uri.startswith("http") and not hint else TrackingError
        raise kind(f"cannot use the MLflow store {public(uri)}: {hint}{one_line(error)}") from error
    return client, None


@contextmanager
def restored() -> Iterator[None]:
    """Give the process its own tracking store back at the end of a block, or of a function.

    :func:`reach` points the whole process at the offline store, its environment included.
    """
    # There is no public way to ask what was set, if anything.
    before = tracking_uris._tracking_uri, registry_uris._registry_uri
    exported = {name: os.environ.get(name) for name in _EXPORTED}
    try:
        yield
    finally:
        if (tracking_uris._tracking_uri, registry_uris._registry_uri) != before:
            mlflow.set_tracking_uri(before[0])  # type: ignore[arg-type]  # None: as if never set
            mlflow.set_registry_uri(before[1])  # type: ignore[arg-type]
        for name, value in exported.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def answers() -> bool:
    """Whether the tracking store is well: a server that can be asked, or a local database."""
    uri = mlflow.get_tracking_uri()
    return not uri.startswith("http") or _probe(uri) is None


def failure(
    error: Exception, missing: str, otherwise: str = "MLflow does not answer, or refuses to"
) -> TrackingError | UnavailableError:
    """Return what to raise for a failed call that asks for something by a name of the user's.

    Args:
        error: what the client raised.
        missing: what is wrong if MLflow says that there is no such thing, or that the name cannot
            be one.
        otherwise: what is wrong with any other answer, or none: it says nothing of the name.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == _NOT_FOUND or getattr(error, "error_code", None) in _MISTAKES:
        return TrackingError(f"{missing}: {one_line(error)}")
    return UnavailableError(f"{otherwise}: {one_line(error)}")


def went_away(error: Exception) -> str | None:
    """What to say of an error that tells of a server that is away; None for any other."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http") or not _is_away(error):
        return None
    return f"the MLflow server {public(uri)} went away ({one_line(error)[:120]})"


def _is_away(error: Exception) -> bool:
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code()) >= 500
    return isinstance(error, OSError)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process of this machine at a time, for a local database.

    Eight that open a new one at once would all migrate it, and leave it unusable.
    """
    if not uri.startswith("sqlite:"):
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    migrations = logging.getLogger("mlflow.store.db.utils")
    level = migrations.level
    file = Path(tempfile.gettempdir()) / f"tunix-mlflow-{os.getuid()}-{name}.lock"
    held = FileLock(file)

    def lock() -> bool:
        try:
            held.acquire(timeout=0)
        except Timeout:
            return False
        return True

    wait_for(lock, f"the MLflow database {public(uri)}", _MIGRATION_SECONDS, file=file)
    try:
        migrations.setLevel(logging.WARNING)  # it tells of each table that it makes
        yield
    finally:
        migrations.setLevel(level)
        held.release()


def wanted_experiment(
    experiment: str | None = None, experiment_id: str | None = None
) -> tuple[str | None, str | None]:
    """Return name or id of the experiment to record in; asks no server.

    That is what was given, else MLflow's: `mlflow.set_experiment`, MLFLOW_EXPERIMENT_NAME,
    MLFLOW_EXPERIMENT_ID; else :data:`DEFAULT_EXPERIMENT`.

    Returns:
        (name, None) or (None, id).
    """
    if experiment_id is not None:
        return None, str(experiment_id)
    if experiment is not None:
        return experiment, None
    chosen: str | None = fluent._active_experiment_id  # there is no public way to ask
    if chosen is not None:
        return None, str(chosen)
    if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        return name, None
    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return None, number
    return DEFAULT_EXPERIMENT, None


def find_experiment(client: MlflowClient, name: str | None, experiment_id: str | None) -> str:
    """Return the id of an experiment; one that is named and not there is made.

    A new one is shown by the UI as model development.

    Args:
        client: reaches the store.
        name: its name, or
        experiment_id: its id.

    Raises:
        TrackingError: if it was deleted, may not be made, or there is none of this id.
        MlflowException: if MLflow does not answer.
    """
    if experiment_id is not None:
        try:
            found = client.get_experiment(experiment_id)
        except MlflowException as error:
            if _is_away(error):
                raise
            raise failure(error, f"experiment {experiment_id}") from error
    else:
        assert name is not None
        named = client.get_experiment_by_name(name)
        if named is None:
            try:
                return str(
                    client.create_experiment(
                        name, artifact_location=_artifacts(name), tags=_KIND_TAG
                    )
                )
            except MlflowException as error:
                named = client.get_experiment_by_name(name)  # another process was first
                if named is None:
                    if _is_away(error):
                        raise
                    raise failure(error, f"experiment {name!r}") from error
        found = named
    if found.lifecycle_stage == "deleted":
        raise TrackingError(f"experiment {found.name!r} was deleted; restore it, or choose another")
    return str(found.experiment_id)


def mark_experiment(client: MlflowClient, experiment: str) -> None:
    """Make the UI open this experiment with its runs and charts, if nobody chose otherwise."""
    found = client.get_experiment(experiment)
    for key, value in _KIND_TAG.items():
        if key not in found.tags:
            client.set_experiment_tag(experiment, key, value)


def run_link(experiment: str, run_id: str | None = None, base: str | None = None) -> str:
    """The address of an experiment or a run in the MLflow UI."""
    uri = base or mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        uri = "http://127.0.0.1:5000"
    page = f"/runs/{run_id}" if run_id else "/runs"
    return (
        f"{public(uri).rstrip('/')}/#/experiments/{experiment}{page}?workflowType=machine_learning"
    )


def ui_command() -> str | None:
    """How to start the UI for a local store; None where a server runs already."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return None
    # In an environment that is not activated, the plain name is not found.
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).parent / "mlflow")
    return f"{program} server --backend-store-uri {public(uri)} --port 5000"


def end_run(client: MlflowClient, run_id: str, status: str, end_time: int | None = None) -> None:
    """Set a run's final status.

    `MlflowClient.set_terminated` prints the run's address to stdout, unless a variable of the
    process says otherwise; a library must do neither.

    Args:
        client: reaches MLflow.
        run_id: MLflow's id.
        status: FINISHED, FAILED or KILLED.
        end_time: milliseconds since the epoch; None: now.

    Raises:
        MlflowException: if MLflow refuses or does not answer.
    """
    client._tracking_client.store.update_run_info(
        run_id, RunStatus.from_string(status), end_time or int(time.time() * 1000), None
    )


def list_artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[FileInfo]:
    """Return the artifacts in a folder of a run, also while another process deletes some.

    MLflow asks for the size of each file that it has listed, and fails where one is gone by then.

    Raises:
        UnavailableError: if that goes on.
    """
    found: list[FileInfo] = []

    def attempt() -> bool:
        try:
            found.extend(client.list_artifacts(run_id, folder))
        except FileNotFoundError:
            return False
        return True

    wait_for(attempt, f"the artifacts of run {run_id}, which another process deletes", 60)
    return found


def has_artifact(client: MlflowClient, run_id: str, artifact: str) -> bool:
    """Return whether a run has an artifact, or a folder of them."""
    parent = Path(artifact).parent
    folder = None if parent == Path() else str(parent)
    return artifact in {found.path for found in list_artifacts(client, run_id, folder)}


def delete_artifacts(client: MlflowClient, run_id: str, artifact: str) -> None:
    """Delete an artifact, or a folder of them; one that is not there is no error."""
    if not has_artifact(client, run_id, artifact):
        return
    uri = client.get_run(run_id).info.artifact_uri
    try:
        get_artifact_repository(uri).delete_artifacts(artifact)
    except Exception:  # each store has its own
        if has_artifact(client, run_id, artifact):
            raise


def _artifacts(name: str) -> str | None:
    # For a local database MLflow would choose a folder in the current one.
    uri = mlflow.get_tracking_uri()
    if uri == paths.offline_tracking_uri():
        return paths.offline_artifacts().as_uri()
    if (file := paths.sqlite_path(uri)) is not None:
        folder = file.absolute().parent
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return (folder / "mlruns" / safe).as_uri()
    return None


def _probe(uri: str) -> str | None:
    """Why a server does not answer; None if it does."""
    import requests

    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_SECONDS)
    except requests.exceptions.SSLError:
        return None  # it is there; whether its certificate will do is for MLflow's settings to say
    except requests.RequestException as error:
        return f"the MLflow server {public(uri)} does not answer ({type(error).__name__})"
    if answer.status_code >= 500:
        return f"the MLflow server {public(uri)} answers {answer.status_code}"
    return None


def public(uri: str) -> str:
    """An address without user and password."""
    parts = urlsplit(uri)
    if parts.hostname and "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=host).geturl()
    return uri
