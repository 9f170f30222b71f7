"""The delivery of a model: its files are written here, and their digest is of what is uploaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.tracking import MlflowClient

from tunix_mlflow.tracking import active
from tunix_mlflow.tracking import tags as names
from tunix_mlflow.tracking.models import flavor
from tunix_mlflow.tracking.record import records
from tunix_mlflow.tracking.record.folder import PACKAGES, RunLink, write_link
from tunix_mlflow.tracking.record.metrics_log import Point
from tunix_mlflow.tracking.sync.answers import Undeliverable
from tunix_mlflow.tracking.sync.metrics import log_batches

_SEAL = "manifest.json"


def log_model(client: MlflowClient, folder: Path, link: RunLink, record: records.Model) -> None:
    """Make a logged model of a bundle: files, digests, READY, an output of the run, metrics.

    A process can die between any two of these calls; whoever delivers the record again finds the
    logged model and does what is left.

    Raises:
        Undeliverable: if the bundle is gone.
        Exception: what the client raises.
    """
    write_link(folder, msgspec.structs.replace(link, model_id=None))
    source = folder / record.bundle
    if not (source / _SEAL).is_file():
        raise Undeliverable(f"the model in {source} is gone")
    tags = record.tags | {
        names.STEP: str(record.at_step),
        names.CONTENT_DIGEST: flavor.content_digest(source),
    }
    logged = _find_model(client, link, tags)
    if logged is None:
        # Not by Model.log, which takes the experiment of this thread's active run: it has none.
        params = client.get_run(link.run_id).data.params
        with active.no_retries():
            logged = client.create_logged_model(
                link.experiment_id, record.name, link.run_id, tags, params, "decoder"
            )
    if str(logged.status) != "READY":
        package = folder / PACKAGES / logged.model_id
        digest = flavor.save_package(
            package,
            source,
            model_id=logged.model_id,
            location=logged.artifact_location,
            run_id=link.run_id,
            prompts=record.prompts,
            weights_digest=tags[names.WEIGHTS_DIGEST],
        )
        client.set_logged_model_tags(logged.model_id, {names.PACKAGE_DIGEST: digest})
        client.log_model_artifacts(logged.model_id, str(package))
        client.finalize_logged_model(logged.model_id, "READY")
        shutil.rmtree(package, ignore_errors=True)
    outputs = client.get_run(link.run_id).outputs
    if logged.model_id not in {one.model_id for one in (outputs.model_outputs if outputs else [])}:
        output = LoggedModelOutput(logged.model_id, step=record.at_step)
        client.log_outputs(link.run_id, [output])
    write_link(folder, msgspec.structs.replace(link, model_id=logged.model_id))
    points = [
        Point(key, value, timestamp, step, logged.model_id, record.dataset)
        for key, value, timestamp, step in record.metrics
    ]
    log_batches(client, link.run_id, points)


def abandon(client: MlflowClient, folder: Path, link: RunLink) -> None:
    """Delete what is there of models that MLflow refuses; offered again, they are made anew."""
    shutil.rmtree(folder / PACKAGES, ignore_errors=True)
    delete_pending(client, link.experiment_id, link.run_id)


def delete_pending(client: MlflowClient, experiment_id: str, run_id: str) -> None:
    """Delete the logged models of a run that are PENDING.

    A delivery that is tried again makes new ones. One that a registered version refers to stays.

    Raises:
        MlflowException: if MLflow refuses or does not answer.
    """
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    pending = [model.model_id for model in found if str(model.status) == "PENDING"]
    if not pending:
        return
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    needed = {str(version.source).removeprefix("models:/") for version in versions}
    for model_id in pending:
        if model_id not in needed:
            client.delete_logged_model(model_id)


def _find_model(client: MlflowClient, link: RunLink, wanted: dict[str, str]) -> LoggedModel | None:
    """Return the logged model that a process made before it died."""
    keys = (names.STEP, names.CONTENT_DIGEST, names.WEIGHTS_DIGEST)
    for one in client.search_logged_models(
        [link.experiment_id], f"source_run_id = '{link.run_id}'"
    ):
        if str(one.status) in ("READY", "PENDING") and all(
            one.tags.get(key) == wanted[key] for key in keys
        ):
            return one
    return None
