"""The gate: what a model must show before it is `champion` in the registry.

It judges by figures that evaluation runs put on the logged model. Figures that training measured
are on it too, and never count: a run does not judge its own model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mlflow.entities import LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import IntegrityError, Refused
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.models import flavor, registry
from tunix_mlflow.tracking.models.registry import CHALLENGER, CHAMPION


class Digests(NamedTuple):
    """The two identities of a model."""

    content: str  # weights, tokenizer, template and limits: equal models
    package: str  # every logged file: nothing was changed


LOWER_IS_BETTER = ("loss",)
"""Metrics, without `eval/`, of which a smaller value is better."""
COUNTS = ("examples", "without_answer")
"""Metrics that say nothing about a model."""


class Promotion(NamedTuple):
    """What the gate did."""

    name: str
    version: str
    verdict: str
    changed: bool  # False: this version was champion before


def check_integrity(client: MlflowClient, model: LoggedModel) -> Digests:
    """Check everything about a model that needs no evaluation.

    Its files are downloaded, and both digests are computed from them again.

    Returns:
        The digests, which the logged model's tags agree with.

    Raises:
        IntegrityError: naming what is wrong.
    """
    name = f"model {model.model_id}"
    if str(model.status) != "READY":
        raise IntegrityError(f"{name} is {model.status}, not READY")
    if model.tags.get("mlflow.model.isExternal", "false").lower() == "true":
        raise IntegrityError(f"{name} is external: it has no files to check")
    run = client.get_run(model.source_run_id) if model.source_run_id else None
    if run is None or run.info.status != "FINISHED":
        what = "no run" if run is None else f"run {run.info.run_id}, which is {run.info.status}"
        raise IntegrityError(f"{name} comes from {what}; it must be FINISHED")
    with flavor.fetch_package(f"models:/{model.model_id}") as package:
        package_digest = flavor.package_digest(package)
        bundle = bundles.load(flavor.bundle_folder(package))
    _compare(name, "the logged model", model.tags, tags.PACKAGE_DIGEST, package_digest)
    digests = Digests(bundles.content_digest(bundle), package_digest)
    _compare(name, "the logged model", model.tags, tags.CONTENT_DIGEST, digests.content)
    weights = bundles.weights_digest(bundle.params)
    _compare(name, "the logged model", model.tags, tags.WEIGHTS_DIGEST, weights)
    _compare(name, "its run", run.data.tags, tags.WEIGHTS_DIGEST, weights)
    if not run.data.tags.get(tags.DATASET_DIGEST):
        raise IntegrityError(f"run {run.info.run_id} does not say what data it was trained on")
    return digests


def promote(
    client: MlflowClient,
    model: LoggedModel,
    name: str,
    *,
    thresholds: Mapping[str, float],
    dataset: str | None,
) -> Promotion:
    """Register as `challenger`, and move `champion` if the gate is passed.

    A model that the registry has under this name, equal in content, is not registered twice.

    Args:
        client: reaches store and registry.
        model: the logged model.
        name: the registered model.
        thresholds: metric without its `eval/` -> the least value that passes; of a metric of
            LOWER_IS_BETTER the largest.
        dataset: key of the dataset to judge on; None: the one last evaluated on.

    Raises:
        IntegrityError: nothing was registered.
        Refused: the version stays `challenger`, and its tag `tunix_mlflow.promotion` says why.
    """
    registry.check_name(name)
    digests = check_integrity(client, model)
    try:
        version = registry.register(client, model, name, digests.content, digests.package)
        client.set_registered_model_alias(name, CHALLENGER, version)
        before = registry.aliased(client, name, CHAMPION)
    except MlflowException as error:
        raise store.failure(error, f"registry, model {name!r}") from error
    rival = None if before == version else before  # a model does not regress against itself
    reason = _reason_to_refuse(client, model, name, rival, thresholds, dataset)
    if reason is not None:
        if before != version:  # a champion keeps why it is one
            client.set_model_version_tag(name, version, tags.PROMOTION, f"refused: {reason}")
        raise Refused(f"{name} version {version} is not promoted: {reason}")
    if before == version:
        return Promotion(name, version, "was champion already", False)
    verdict = f"promoted over version {before}" if before else "promoted, the first"
    client.set_model_version_tag(name, version, tags.PROMOTION, verdict)
    client.set_registered_model_alias(name, CHAMPION, version)
    return Promotion(name, version, verdict, True)


def is_better_or_equal(metric: str, value: float, other: float) -> bool:
    """Return whether a figure is at least as good as another; a NaN is not."""
    return value <= other if metric in LOWER_IS_BETTER else value >= other


def evaluation_metrics(client: MlflowClient, model: LoggedModel) -> list[Metric]:
    """Return the metrics on a logged model that evaluation runs of ours measured on a dataset.

    Raises:
        MlflowException: if MLflow does not answer.
    """
    of_evaluation: dict[str, bool] = {}
    found = []
    for metric in model.metrics or []:
        run_id = metric.run_id
        if not run_id or run_id == model.source_run_id or not metric.dataset_digest:
            continue
        if run_id not in of_evaluation:
            try:
                stage = client.get_run(run_id).data.tags.get(tags.STAGE)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                stage = None  # deleted for good: nobody can look at what it measured
            of_evaluation[run_id] = stage == "evaluate"
        if of_evaluation[run_id]:
            found.append(metric)
    return found


def figures(metrics: list[Metric], dataset: tuple[str, str]) -> dict[str, float]:
    """Return the latest value of each `eval/` metric on a dataset, by name without `eval/`.

    Args:
        metrics: of a logged model.
        dataset: MLflow's name and digest of the dataset.
    """
    latest: dict[str, Metric] = {}
    for metric in metrics:
        if (metric.dataset_name, metric.dataset_digest) != dataset:
            continue
        key = metric.key.removeprefix("eval/")
        if key not in latest or metric.timestamp >= latest[key].timestamp:
            latest[key] = metric
    return {key: metric.value for key, metric in latest.items()}


def _reason_to_refuse(
    client: MlflowClient,
    model: LoggedModel,
    name: str,
    champion: str | None,
    thresholds: Mapping[str, float],
    dataset: str | None,
) -> str | None:
    """Return why the model is not promoted; None if it is."""
    if not thresholds:
        return "promotion.thresholds is empty; name at least one metric"
    metrics = evaluation_metrics(client, model)
    measured_on = _latest_dataset(metrics, dataset)
    if measured_on is None:
        where = f" on all of {dataset}" if dataset else ""
        return (
            f"it was never evaluated{where}; run"
            f" `tunix-mlflow evaluate {model.model_id} --dataset {dataset or 'KEY'}`"
        )
    values = figures(metrics, measured_on)
    for metric, least in sorted(thresholds.items()):
        if metric not in values:
            return f"eval/{metric} was not measured on {measured_on[0]}"
        if not is_better_or_equal(metric, values[metric], least):
            most = "at most " if metric in LOWER_IS_BETTER else ""
            return (
                f"eval/{metric} is {values[metric]:.4f} on {measured_on[0]}, required"
                f" {most}{least:.4f}"
            )
    if champion is None:
        return None
    other = registry.resolve(client, f"models:/{name}/{champion}")
    theirs = figures(evaluation_metrics(client, other), measured_on)
    for metric in sorted(thresholds):
        if metric not in theirs:
            return (
                f"champion version {champion} has no eval/{metric} on {measured_on[0]}"
                f" ({measured_on[1][:12]}); evaluate models:/{name}@{CHAMPION} on it first"
            )
        if not is_better_or_equal(metric, values[metric], theirs[metric]):
            return (
                f"eval/{metric} is {values[metric]:.4f} on {measured_on[0]}, and champion version"
                f" {champion} has {theirs[metric]:.4f}"
            )
    return None


def _latest_dataset(metrics: list[Metric], key: str | None) -> tuple[str, str] | None:
    found = [
        metric
        for metric in metrics
        if key is None or str(metric.dataset_name).startswith(f"{key}/")
    ]
    if not found:
        return None
    last = max(found, key=lambda metric: metric.timestamp)
    return str(last.dataset_name), str(last.dataset_digest)


def _compare(name: str, where: str, stored: Mapping[str, str], tag: str, digest: str) -> None:
    if stored.get(tag) != digest:
        what = tag.removeprefix(tags.PREFIX).replace("_", " ")
        raise IntegrityError(
            f"{name}: {where} has {what} {str(stored.get(tag))[:16]}, its files have {digest[:16]}"
        )
