"""The model registry: which logged model a reference names, versions and aliases."""

from __future__ import annotations

import re

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import ConfigError, TrackingError
from tunix_mlflow.runtime.waiting import wait_for
from tunix_mlflow.tracking import active, store, tags

CHAMPION, CHALLENGER = "champion", "challenger"
_READY_SECONDS = 300
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,199}")


def resolve(client: MlflowClient, reference: str) -> LoggedModel:
    """Return the logged model that a run id, a model id or a models:/ URI names.

    Raises:
        TrackingError: if there is none.
    """
    try:
        if reference.startswith("models:/"):
            reference = _model_id(client, reference.removeprefix("models:/"))
        if reference.startswith("m-"):
            return client.get_logged_model(reference)
        run = client.get_run(reference.removeprefix("runs:/").partition("/")[0])
        outputs = run.outputs.model_outputs if run.outputs else []
        models = [client.get_logged_model(output.model_id) for output in outputs]
        ready = [model for model in models if str(model.status) == "READY"]
        if not ready:
            raise TrackingError(f"run {reference} has logged no model; train it to its end")
        return max(ready, key=lambda model: model.creation_timestamp)
    except MlflowException as error:
        raise store.failure(
            error,
            f"there is no model {reference!r} (a run id, models:/m-..., models:/NAME/VERSION or"
            " models:/NAME@ALIAS)",
        ) from error


def check_name(name: str) -> None:
    """Check the name of a registered model.

    Raises:
        ConfigError: if MLflow or a path could not hold it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be registered: use letters, digits, '_', '.', '-' and spaces"
        )


def register(
    client: MlflowClient, model: LoggedModel, name: str, content_digest: str, package_digest: str
) -> str:
    """Return the version of this content under a name; make one if there is none.

    Args:
        client: reaches the registry.
        model: the logged model.
        name: the registered model; made if it is not there.
        content_digest: of the model; the tag by which a version is found again.
        package_digest: of the model's files; a tag of the new version.

    Raises:
        MlflowException: if MLflow does not answer, or the registry fails to make the version.
    """
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name)
        except MlflowException as failure:
            # By another process, or by this one, whose first answer was lost.
            if failure.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    number = _version_of(client, name, content_digest)
    if number is None:
        given = {tags.CONTENT_DIGEST: content_digest, tags.PACKAGE_DIGEST: package_digest}
        try:
            with active.no_retries():
                number = _create_version(client, name, model, given)
        except MlflowException:
            number = _version_of(client, name, content_digest)  # perhaps only the answer was lost
            if number is None:
                raise
        first = _version_of(client, name, content_digest)
        if first is not None and first != number:  # another process made it at the same moment
            client.delete_model_version(name, number)
            number = first
    _wait_until_ready(client, name, number)
    return number


def _version_of(client: MlflowClient, name: str, content_digest: str) -> str | None:
    """Return the version of a content, the first of several; None if there is none."""
    found = [
        int(version.version)
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get(tags.CONTENT_DIGEST) == content_digest
    ]
    return str(min(found)) if found else None


def _create_version(
    client: MlflowClient, name: str, model: LoggedModel, given: dict[str, str]
) -> str:
    created = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags=given,
        await_creation_for=0,  # MLflow's own waiting logs a line, whether it waits or not
    )
    return str(created.version)


def _wait_until_ready(client: MlflowClient, name: str, version: str) -> None:
    """Wait for a registry that copies a version's files after it has answered."""
    found = client.get_model_version(name, version)

    def is_settled() -> bool:
        nonlocal found
        if found.status == "PENDING_REGISTRATION":
            found = client.get_model_version(name, version)
        return bool(found.status != "PENDING_REGISTRATION")

    what = f"{name} version {version} to be registered"
    wait_for(is_settled, what, _READY_SECONDS, longest_pause=1.0)
    if found.status != "READY":
        raise MlflowException(f"{name} version {version} is {found.status}: {found.status_message}")


def aliased(client: MlflowClient, name: str, alias: str) -> str | None:
    """Return the version that an alias names; None if there is none."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def _model_id(client: MlflowClient, path: str) -> str:
    if path.startswith("m-"):
        return path
    name, at, alias = path.partition("@")
    if at:
        version = client.get_model_version_by_alias(name, alias)
    else:
        name, _, number = path.rpartition("/")
        version = client.get_model_version(name, number)
    # ModelVersion.model_id is not filled in; the source is models:/m-...
    source = str(version.source)
    if not source.startswith("models:/m-"):
        raise TrackingError(f"{name} version {version.version} is not a logged model: {source}")
    return source.removeprefix("models:/")


def training_run_tag(model: LoggedModel) -> dict[str, str]:
    """Return the tag that links a run that used a model to the run that trained it."""
    return {tags.TRAINING_RUN: model.source_run_id} if model.source_run_id else {}


def training_run_link(client: MlflowClient, model: LoggedModel) -> str | None:
    """Return the page of the run that trained a model; None if there is no such run."""
    if not model.source_run_id:
        return None
    try:
        info = client.get_run(model.source_run_id).info
    except MlflowException:
        return None
    return store.run_link(info.experiment_id, info.run_id)
