"""Looking up runs that exist, before one goes on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mlflow.exceptions import MlflowException

from tunix_mlflow import config as configs
from tunix_mlflow import state
from tunix_mlflow.config import Config
from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking import store


def to_resume(run_id: str) -> tuple[Config, dict[str, str]]:
    """Configuration and environment of a training run that did not finish.

    They are read from the run's local folder, else from its artifacts.

    Raises:
        TrackingError: if there is no such run, it is no training run, or it has finished.
    """
    folder = state.run_dir(run_id)
    local = folder / "config.json"
    try:
        found = configs.from_json(local.read_bytes(), str(local)) if local.is_file() else Config()
    except OSError as error:
        raise TrackingError(f"cannot read {local}: {error.strerror}") from error
    client = store.connect(found.tracking)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"there is no run {run_id!r}: {store.one_line(error)}") from error
    stage = run.data.tags.get("tunix.stage")
    if stage != "train" or "tunix.dataset_digest" not in run.data.tags:
        raise TrackingError(f"run {run_id} is not a training run of ours; see it in the UI")
    if run.info.status == "FINISHED":
        raise TrackingError(f"run {run_id} has finished; there is nothing to resume")
    with tempfile.TemporaryDirectory() as fetched:
        texts = []
        for name in ("config.json", "environment.json"):
            path = folder / name
            if not path.is_file():
                try:
                    path = Path(client.download_artifacts(run_id, name, fetched))
                except (MlflowException, OSError) as error:
                    raise TrackingError(
                        f"run {run_id} has no {name}, here or in MLflow: {store.one_line(error)}"
                    ) from error
            texts.append(path.read_bytes())
    config = configs.from_json(texts[0], f"config.json of run {run_id}")
    return config, {str(k): str(v) for k, v in json.loads(texts[1]).items()}
