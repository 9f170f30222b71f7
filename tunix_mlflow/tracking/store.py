"""Reaching MLflow: the tracking store, the experiment, and links into the UI."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import state
from tunix_mlflow.config import TrackingConfig
from tunix_mlflow.errors import TrackingError

DEFAULT_EXPERIMENT = "tunix-mlflow"
_KIND_TAG = {"mlflow.experimentKind": "custom_model_development"}
_PROBE_SECONDS = 5


def connect(config: TrackingConfig) -> MlflowClient:
    """Point this process at its tracking store, and find out at once whether it answers.

    Raises:
        TrackingError: in seconds, not in the minutes that MLflow's own retries take.
    """
    if config.offline:
        state.offline_artifacts().mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(state.offline_tracking_uri())
        mlflow.set_registry_uri(state.offline_tracking_uri())
    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        _probe(uri)
    elif uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).is_dir():
        raise TrackingError(f"cannot use the MLflow store {uri}: it is a folder, not a database")
    try:
        client = MlflowClient()
        client.search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy's and the HTTP client's errors share no base
        hint = ""
        if "401" in str(error) or "403" in str(error):
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: "
        raise TrackingError(
            f"cannot use the MLflow store {_public(uri)}: {hint}{one_line(error)}"
        ) from error
    return client


def experiment_id(client: MlflowClient, config: TrackingConfig) -> str:
    """The experiment to record in; made, and shown by the UI as model development, if new.

    Raises:
        TrackingError: if it was deleted or may not be made.
    """
    name = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                made: str = client.create_experiment(
                    name, artifact_location=_artifacts(config), tags=_KIND_TAG
                )
                return made
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise
    except MlflowException as error:
        raise TrackingError(f"experiment {name!r}: {one_line(error)}") from error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} was deleted; restore it, or set tracking.experiment"
        )
    found_id: str = found.experiment_id
    return found_id


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
        f"{_public(uri).rstrip('/')}/#/experiments/{experiment}{page}?workflowType=machine_learning"
    )


def ui_command() -> str | None:
    """How to start the UI for a local store; None where a server runs already."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return None
    # In an environment that is not activated, the plain name is not found.
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).parent / "mlflow")
    return f"{program} server --backend-store-uri {_public(uri)} --port 5000"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__


def _artifacts(config: TrackingConfig) -> str | None:
    # For a local database MLflow would choose a folder in the current one.
    if config.offline:
        return state.offline_artifacts().as_uri()
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
        name = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return (folder / "mlruns" / safe).as_uri()
    return None


def _probe(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_SECONDS)
    except requests.exceptions.SSLError:
        pass  # it is there; whether its certificate will do is for MLflow's settings to say
    except requests.RequestException as error:
        raise TrackingError(
            f"the MLflow server {_public(uri)} does not answer ({type(error).__name__}); start it,"
            " set MLFLOW_TRACKING_URI, or record locally with tracking.offline=true"
        ) from error


def _public(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.hostname and "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=host).geturl()
    return uri
