"""The gate: what a model must show before it is `champion` in the registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import ConfigError, IntegrityError, Refused, TrackingError
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.models import flavor

CHAMPION, CHALLENGER = "champion", "challenger"
WEIGHTS_TAG = "tunix_mlflow.weights_digest"
MODEL_TAG = "tunix_mlflow.model_digest"
VERDICT_TAG = "tunix_mlflow.promotion"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,199}")


class Promotion(NamedTuple):
    """What the gate did."""

    name: str
    version: str
    verdict: str
    changed: bool  # False: this version was champion before


def resolve(client: MlflowClient, reference: str) -> LoggedModel:
    """The logged model that a run id, a model id or a models:/ URI names.

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
        raise TrackingError(
            f"there is no model {reference!r}: {store.one_line(error)}; expected a run id,"
            " models:/m-..., models:/NAME/VERSION or models:/NAME@ALIAS"
        ) from error


def check_integrity(client: MlflowClient, model: LoggedModel) -> str:
    """Everything about a model that needs no evaluation.

    Returns:
        The digest of the whole model.

    Raises:
        IntegrityError: naming what is wrong.
    """
    if str(model.status) != "READY":
        raise IntegrityError(f"model {model.model_id} is {model.status}, not READY")
    if model.tags.get("mlflow.model.isExternal", "false").lower() == "true":
        raise IntegrityError(f"model {model.model_id} is external: it has no files to check")
    run = client.get_run(model.source_run_id) if model.source_run_id else None
    if run is None or run.info.status != "FINISHED":
        what = "no run" if run is None else f"run {run.info.run_id}, which is {run.info.status}"
        raise IntegrityError(f"model {model.model_id} comes from {what}; it must be FINISHED")
    bundle = flavor.load_model(f"models:/{model.model_id}")
    digest = bundles.weights_digest(bundle.params)
    for where, tags in (("the logged model", model.tags), ("its run", run.data.tags)):
        if tags.get(WEIGHTS_TAG) != digest:
            raise IntegrityError(
                f"model {model.model_id}: {where} says weights {tags.get(WEIGHTS_TAG)!s:.16},"
                f" its files say {digest[:16]}"
            )
    if not run.data.tags.get("tunix_mlflow.dataset_digest"):
        raise IntegrityError(f"run {run.info.run_id} does not say what data it was trained on")
    return bundles.content_digest(bundle)


def promote(
    client: MlflowClient,
    model: LoggedModel,
    name: str,
    *,
    thresholds: Mapping[str, float],
    dataset: str | None,
) -> Promotion:
    """Register as `challenger`, and move `champion` if the gate is passed.

    A model that the registry has under this name, bit for bit, is not registered twice.

    Args:
        client: reaches store and registry.
        model: the logged model.
        name: the registered model.
        thresholds: metric without its `eval/` -> the least value that passes.
        dataset: key of the dataset to judge on; None: the one last evaluated on.

    Raises:
        IntegrityError: nothing was registered.
        Refused: the version stays `challenger`, and its tag `tunix_mlflow.promotion` says why.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be registered: use letters, digits, '_', '.', '-' and spaces"
        )
    digest = check_integrity(client, model)
    try:
        version = _register(client, model, name, digest)
        client.set_registered_model_alias(name, CHALLENGER, version)
        before = _aliased(client, name, CHAMPION)
    except MlflowException as error:
        raise TrackingError(f"registry, model {name!r}: {store.one_line(error)}") from error
    rival = None if before == version else before  # a model does not regress against itself
    reason = _judge(client, model, name, rival, thresholds, dataset)
    if reason is not None:
        verdict = f"refused: {reason}"
        client.set_model_version_tag(name, version, VERDICT_TAG, verdict)
        raise Refused(f"{name} version {version} is not promoted: {reason}")
    if before == version:
        return Promotion(name, version, "was champion already", False)
    verdict = f"promoted over version {before}" if before else "promoted, the first"
    client.set_model_version_tag(name, version, VERDICT_TAG, verdict)
    client.set_registered_model_alias(name, CHAMPION, version)
    return Promotion(name, version, verdict, True)


def _judge(
    client: MlflowClient,
    model: LoggedModel,
    name: str,
    champion: str | None,
    thresholds: Mapping[str, float],
    dataset: str | None,
) -> str | None:
    """Why the gate stays shut; None: it opens."""
    if not thresholds:
        return "promotion.thresholds is empty; name at least one metric"
    judged_on = _latest_dataset(model, dataset)
    if judged_on is None:
        where = f" on the whole of {dataset}" if dataset else ""
        return (
            f"it was never evaluated{where}; run"
            f" `tunix-mlflow evaluate {model.model_id} dataset={dataset or 'KEY'}`"
        )
    mine = _metrics(model, judged_on)
    for metric, least in sorted(thresholds.items()):
        if metric not in mine:
            return f"eval/{metric} was not measured on {judged_on[0]}"
        if not mine[metric] >= least:
            return f"eval/{metric} is {mine[metric]:.4f} on {judged_on[0]}, required {least:.4f}"
    if champion is None:
        return None
    other = resolve(client, f"models:/{name}/{champion}")
    theirs = _metrics(other, judged_on)
    for metric in sorted(thresholds):
        if metric not in theirs:
            return (
                f"champion version {champion} has no eval/{metric} on {judged_on[0]}"
                f" ({judged_on[1][:12]}); evaluate models:/{name}@{CHAMPION} on it first"
            )
        if mine[metric] < theirs[metric]:
            return (
                f"eval/{metric} is {mine[metric]:.4f} on {judged_on[0]}, and champion version"
                f" {champion} has {theirs[metric]:.4f}"
            )
    return None


def _metrics(model: LoggedModel, dataset: tuple[str, str]) -> dict[str, float]:
    """Latest value of each `eval/` metric on the dataset of this name and digest."""
    latest: dict[str, Any] = {}
    for metric in model.metrics or []:
        if (metric.dataset_name, metric.dataset_digest) != dataset:
            continue
        key = metric.key.removeprefix("eval/")
        if key not in latest or metric.timestamp >= latest[key].timestamp:
            latest[key] = metric
    return {key: metric.value for key, metric in latest.items()}


def _latest_dataset(model: LoggedModel, key: str | None) -> tuple[str, str] | None:
    found = [
        m
        for m in model.metrics or []
        if m.dataset_digest and (key is None or str(m.dataset_name).startswith(f"{key}/"))
    ]
    if not found:
        return None
    last = max(found, key=lambda m: m.timestamp)
    return str(last.dataset_name), str(last.dataset_digest)


def _register(client: MlflowClient, model: LoggedModel, name: str, digest: str) -> str:
    """The version with these weights; made if there is none."""
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(MODEL_TAG) == digest:
            return str(version.version)
    made = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags={MODEL_TAG: digest},
    )
    return str(made.version)


def _aliased(client: MlflowClient, name: str, alias: str) -> str | None:
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
