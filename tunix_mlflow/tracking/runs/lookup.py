"""Runs that exist: by id, by key, on this machine and in MLflow."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.config.load import from_json
from tunix_mlflow.config.schema import Config, TrackingConfig
from tunix_mlflow.errors import ConfigError, TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record import folder, metrics_log
from tunix_mlflow.tracking.record.event_log import recorded_status, recorded_tags
from tunix_mlflow.tracking.record.folder import CONFIG, ENVIRONMENT, EVENT_LOG, read_link
from tunix_mlflow.tracking.sync import upload

_PAGE = 1000


class RecordedRun(NamedTuple):
    """A training run, as it recorded itself."""

    run_id: str
    config: Config
    environment: dict[str, str]
    status: str | None  # None: its process died, and MLflow is away
    client: MlflowClient | None  # None: MLflow is away


class NotRecorded(TrackingError):
    """A training run that died before it recorded its configuration."""


def look_up(run_id: str, report: Callable[[str], None]) -> RecordedRun:
    """Return a training run of ours, by MLflow's id or the name of a folder.

    Its configuration and environment are read from its local folder, else from its artifacts.

    Args:
        run_id: of the run.
        report: called with what MLflow refuses of a run that is uploaded to have an id.

    Raises:
        NotRecorded: if it died before it recorded its configuration.
        UnavailableError: if MLflow is away and the run is not on this machine, or it is open.
        TrackingError: if there is none.
    """
    if not run_id.isalnum():
        raise TrackingError(f"{run_id[:80]!r} is no run id: expected 32 hex digits")
    path = paths.run_dir(run_id)
    local = path / CONFIG
    try:
        found = from_json(local.read_bytes(), str(local)) if local.is_file() else Config()
    except OSError as error:
        raise TrackingError(f"cannot read {local}: {one_line(error)}") from error
    except ConfigError as error:
        raise TrackingError(f"{error}; or run tunix-mlflow runs repair {run_id}") from error
    client, away = store.reach(found.tracking)
    if away is not None:
        if not local.is_file():
            raise UnavailableError(f"{away}, and run {run_id} is not on this machine")
        if not tags.is_training_run(recorded_tags(path)):
            raise TrackingError(f"run {run_id} is not a training run")
        status = recorded_status(path)
        if not (path / ENVIRONMENT).is_file():
            raise NotRecorded(f"run {run_id} died before it could record its configuration")
        texts = [(path / name).read_bytes() for name in (CONFIG, ENVIRONMENT)]
    else:
        run_id = mlflow_id(client, run_id, report)
        status = _training_run(client, run_id).info.status
        texts = _configuration(client, run_id, path)
    try:
        variables = {k: str(v) for k, v in json.loads(texts[1]).items()}
        recorded = from_json(texts[0], f"config.json of run {run_id}")
    except (ValueError, AttributeError) as error:
        raise TrackingError(
            f"environment.json of run {run_id} is damaged; run tunix-mlflow runs repair {run_id}"
        ) from error
    except ConfigError as error:
        raise TrackingError(f"{error}; or run tunix-mlflow runs repair {run_id}") from error
    return RecordedRun(run_id, recorded, variables, status, client if away is None else None)


def mlflow_id(client: MlflowClient, run_id: str, report: Callable[[str], None]) -> str:
    """Return MLflow's id of a run that may be named by its folder.

    One that began while MLflow was away is uploaded first, so that it has an id.

    Args:
        client: reaches MLflow.
        run_id: MLflow's, or the folder's name.
        report: called with what MLflow refuses.

    Raises:
        UnavailableError: if it has none, and is open in another process.
    """
    path = paths.run_dir(run_id)
    if (path / EVENT_LOG).exists() and read_link(path) is None:
        held = folder.lock(path)
        try:
            upload.catch_up(client, path, report)
        finally:
            held.release()
    link = read_link(path)
    return link.run_id if link else run_id


def of_key(tracking: TrackingConfig) -> str | None:
    """Return the newest training run with `tracking.key`, by MLflow's id or its folder's name.

    None if there is none.

    Raises:
        TrackingError: if the store cannot be used.
    """
    client, away = store.reach(tracking)
    if away is None:
        experiments = [e.experiment_id for e in client.search_experiments()]
        for run in client.search_runs(
            experiments,
            f"{_has_key(tracking.key or '')} and {tags.TRAINING_FILTER}",
            order_by=["attributes.start_time DESC"],
            max_results=10,
        ):
            if tags.is_training_run(run.data.tags):
                return str(run.info.run_id)
    for path in folders():
        if (away is None and read_link(path) is not None) or not is_of_this_store(path):
            continue  # MLflow has it, or it is another server's
        recorded = recorded_tags(path)
        if recorded.get(tags.KEY) == tracking.key and tags.is_training_run(recorded):
            return path.name
    return None


def unfinished_of_key(
    client: MlflowClient | None,
    experiment_id: str | None,
    key: str,
    report: Callable[[str], None],
) -> str | None:
    """Return the newest run with a key, of whatever stage, that has not finished.

    One that began while MLflow was away is uploaded first, so that it has an id.

    Args:
        client: reaches MLflow; None: it is away, and only this machine is asked.
        experiment_id: where to look in MLflow.
        key: the tag's value.
        report: called with what MLflow refuses.

    Returns:
        MLflow's id, or the name of a folder that MLflow does not have; None if there is none.
    """
    for path in folders():
        if (client is not None and read_link(path) is not None) or not is_of_this_store(path):
            continue  # MLflow has it, or it is another server's
        if recorded_tags(path).get(tags.KEY) != key or recorded_status(path) == "FINISHED":
            continue
        if client is None:
            return path.name
        if not folder.is_open(path):
            mlflow_id(client, path.name, report)
    if client is None or experiment_id is None:
        return None
    runs = client.search_runs(
        [experiment_id],
        f"{_has_key(key)} and attributes.status != 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return str(runs[0].info.run_id) if runs else None


def child_links(client: MlflowClient, run_id: str, experiment_id: str) -> dict[str, str]:
    """Return the pages of the children of a run of all stages, by stage, in their order."""
    children = client.search_runs(
        [experiment_id],
        f"tags.`{tags.PARENT}` = '{run_id}'",
        order_by=["attributes.start_time ASC"],
    )
    return {
        child.data.tags.get(tags.STAGE, "run"): store.run_link(experiment_id, child.info.run_id)
        for child in children
    }


def training_runs(client: MlflowClient, limit: int) -> list[Run]:
    """Return the newest training runs of all experiments."""
    newest_first = ["attributes.start_time DESC"]
    found = search(client, tags.TRAINING_FILTER, order_by=newest_first, page=min(_PAGE, limit))
    return list(itertools.islice((r for r in found if tags.is_training_run(r.data.tags)), limit))


def search(
    client: MlflowClient,
    condition: str,
    *,
    view: int = ViewType.ACTIVE_ONLY,
    order_by: Sequence[str] = (),
    page: int = _PAGE,
) -> Iterator[Run]:
    """Yield the runs of all experiments that meet a condition of MLflow's.

    Args:
        client: reaches MLflow.
        condition: a filter string of `search_runs`.
        view: whether deleted ones count.
        order_by: as of `search_runs`.
        page: how many are asked for at a time.

    Raises:
        MlflowException: if MLflow does not answer.
    """
    experiments = client.search_experiments(view_type=view, max_results=_PAGE)
    ids, token = [experiment.experiment_id for experiment in experiments], None
    while True:
        found = client.search_runs(ids, condition, view, page, list(order_by), token)
        yield from found
        token = found.token
        if not token:
            return


def folders() -> list[Path]:
    """Return the run folders of this state root, each once, the newest first."""
    root = paths.run_dir("")
    found = (
        [p for p in root.iterdir() if p.is_dir() and not p.is_symlink()] if root.exists() else []
    )
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def folder_of(run_id: str) -> Path | None:
    """Return the folder of a run on this machine; None if there is none."""
    path = paths.run_dir(run_id)
    return path.resolve() if run_id.isalnum() and path.is_dir() else None


def is_of_this_store(path: Path) -> bool:
    """Return whether a folder's run is of this tracking store, or of none yet."""
    link = read_link(path)
    return link is None or link.tracking_uri == store.public(mlflow.get_tracking_uri())


def is_forked(path: Path, client: MlflowClient | None, run_id: str) -> bool:
    """Return whether a run began at a checkpoint of another one.

    Args:
        path: its folder.
        client: reaches MLflow; None: by the folder alone.
        run_id: MLflow's.
    """
    found = recorded_tags(path)
    if client is not None:
        found |= client.get_run(run_id).data.tags
    return tags.FORKED_FROM in found


def tag_launcher(client: MlflowClient, launched: str, run_id: str) -> None:
    """Say of a run that `mlflow run` made that it only launched another.

    Args:
        client: reaches MLflow.
        launched: the run that `mlflow run` made.
        run_id: the run that the process continued.
    """
    if launched != run_id:
        client.set_tag(launched, tags.LAUNCHER_OF, run_id)


def history(
    client: MlflowClient, run_id: str, keys: Collection[str] | None = None
) -> list[metrics_log.Point]:
    """Return every point that MLflow has of a run, or of some of its metrics."""
    have = client.get_run(run_id).data.metrics
    return [
        metrics_log.Point(m.key, m.value, m.timestamp, m.step)
        for key in have
        if keys is None or key in keys
        for m in client.get_metric_history(run_id, key)
    ]


def _has_key(key: str) -> str:
    """Return the filter of `search_runs` for a key."""
    if "'" in key and '"' in key:
        raise TrackingError(f"key {key!r}: use no quotation marks")
    quote = '"' if "'" in key else "'"
    return f"tags.`{tags.KEY}` = {quote}{key}{quote}"


def _training_run(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise store.failure(error, f"there is no run {run_id!r}") from error
    if tags.LAUNCHER_OF in run.data.tags:
        target = run.data.tags[tags.LAUNCHER_OF]
        raise TrackingError(f"run {run_id} only launched run {target}; resume that one")
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(f"run {run_id} was deleted; restore it in MLflow first")
    if not tags.is_training_run(run.data.tags):
        raise TrackingError(f"run {run_id} is not a training run of ours; see it in the UI")
    return run


def _configuration(client: MlflowClient, run_id: str, path: Path) -> list[bytes]:
    texts = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG, ENVIRONMENT):
            file = path / name
            if not file.is_file():
                try:
                    file = download_artifact(client, run_id, name, Path(scratch))
                except (MlflowException, OSError) as error:
                    raise NotRecorded(
                        f"run {run_id} has no {name}, here or in MLflow: it died before it could"
                        f" record it; start a new run ({one_line(error)})"
                    ) from error
            texts.append(file.read_bytes())
    return texts
