"""Records that MLflow will never take, as opposed to a server that is away."""

from __future__ import annotations

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient


class Undeliverable(Exception):
    """MLflow will never take this record."""


def is_refusal(client: MlflowClient, run_id: str, error: MlflowException) -> bool:
    """Return whether MLflow will never take what it did not take.

    Not when the run is not there: this may be the wrong server, or one that is half up. Nor when
    it was deleted, for it can be restored.
    """
    if error.error_code != "INVALID_PARAMETER_VALUE":
        return False
    return bool(client.get_run(run_id).info.lifecycle_stage == "active")
