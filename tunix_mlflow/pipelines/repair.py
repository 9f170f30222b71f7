"""Repair the folder of a run from what MLflow has, and MLflow from what the folder has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.config.load import from_json
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import ConfigError, TrackingError
from tunix_mlflow.models import arrays
from tunix_mlflow.pipelines.names import model_name
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record import metrics_log, records
from tunix_mlflow.tracking.record.cursor import Cursor, read_cursor, update_cursor
from tunix_mlflow.tracking.record.event_log import EventLog, read_records, recorded_end
from tunix_mlflow.tracking.record.folder import (
    CONFIG,
    CURSOR,
    ENVIRONMENT,
    EVENT_LOG,
    LEASE,
    METRICS_LOG,
    MODELS,
    RUN_LINK,
)
from tunix_mlflow.tracking.runs import lookup, resume
from tunix_mlflow.tracking.sync import calls, upload


class RepairResult(NamedTuple):
    """What a repair did."""

    run_id: str
    repaired: list[str]  # in words; empty: nothing was wrong
    remaining: list[str]  # what cannot be repaired, or what MLflow still refuses


@store.restored()
def repair(run_id: str, *, reporter: Reporter = SILENT) -> RepairResult:
    """Make the folder of a run whole, deliver everything in it again, and set the run's status.

    Lines of the logs that cannot be read are put aside, beside the log, and files are fetched from
    MLflow where it has them. What MLflow has already is not there twice afterwards. If something
    was damaged, tags get their recorded values again; else those that MLflow has are kept.

    Args:
        run_id: MLflow's, or the name of the folder.
        reporter: receives messages.

    Raises:
        TrackingError: if there is no such run on this machine.
        UnavailableError: if the run is open, or MLflow does not answer.
    """
    path = lookup.folder_of(run_id)
    if path is None:
        raise TrackingError(
            f"there is no run {run_id[:80]!r} in {paths.run_dir('')}; resume fetches it from MLflow"
        )
    client = store.connect(TrackingConfig())
    done: list[str] = []
    remaining: list[str] = []

    def note(message: str) -> None:
        done.append(message)
        reporter.info(message)

    held = folders.lock(path)
    try:
        _repair_link(client, path, note)
        _repair_lease(client, path, note)
        lost = _repair_events(path, note)
        _repair_metrics(path, note)
        if done:
            (path / CURSOR).unlink(missing_ok=True)
        else:  # not the fields: a user may have changed tags since
            at = read_cursor(path)
            update_cursor(path, lambda _: Cursor(fields=at.fields, refused=at.refused))
        link = folders.read_link(path)
        if link is not None:
            resume.refill(client, link.run_id, path, note)
            remaining += _repair_files(client, link.run_id, path, note)
            if lost:
                _record_again(client, link.run_id, path, note)
    finally:
        held.release()
    upload.sync(client, path, reporter.info)
    refused = upload.describe_refused(path)
    link = folders.read_link(path)
    return RepairResult(
        link.run_id if link else path.name,
        done,
        remaining + ([f"MLflow refuses {refused}"] if refused else []),
    )


def _repair_lease(client: MlflowClient, path: Path, note: Callable[[str], None]) -> None:
    """Hold the run's lease under another name, if that of this folder is lost.

    Raises:
        UnavailableError: if another process holds it.
    """
    file, link = path / LEASE, folders.read_link(path)
    if link is not None and not (file.exists() and file.read_bytes().isalnum()):
        upload.reclaim(client, path, link.run_id, note)
        note(f"{LEASE}: the name was lost; the run is this folder's under a new one")


def _repair_link(client: MlflowClient, path: Path, note: Callable[[str], None]) -> None:
    """Find the MLflow run of a folder again.

    Raises:
        TrackingError: if MLflow has none, and the folder cannot make one.
    """
    try:
        link = folders.read_link(path)
        if link is not None and link.tracking_uri == store.public(mlflow.get_tracking_uri()):
            return
        why = "was missing" if link is None else f"named {link.tracking_uri}"
    except TrackingError:
        link, why = None, "was damaged"
    found = None
    try:
        found = client.get_run(link.run_id if link else path.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        ids = [e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)]
        named = client.search_runs(ids, f"tags.`{tags.LOCAL_ID}` = '{path.name}'")
        found = named[0] if named else None
    if found is not None:
        (path / RUN_LINK).unlink(missing_ok=True)
        calls.adopt(path, found.info.run_id, found.info.experiment_id)
        note(f"{RUN_LINK} {why}: the folder is that of run {found.info.run_id} of this store")
    elif any(isinstance(record, records.Create) for _, record in read_records(path)):
        (path / RUN_LINK).unlink(missing_ok=True)  # the run was never made
    else:
        raise TrackingError(f"{path} belongs to no run that MLflow has, and does not say which")


def _repair_events(path: Path, note: Callable[[str], None]) -> bool:
    """Put aside the lines of the event log that are no records; whether any were lost."""
    log = path / EVENT_LOG
    if not log.is_file() or not log.stat().st_size:
        note(f"{EVENT_LOG} was empty: what it recorded is taken from the folder and from MLflow")
        log.touch()
        return True

    def is_record(line: bytes) -> bool:
        try:
            records.decode(line)
        except records.Unreadable:
            return False
        return True

    return _keep_lines(log, is_record, note)


def _repair_metrics(path: Path, note: Callable[[str], None]) -> None:
    """Put aside the lines of the metrics log that cannot be read."""

    def is_line(line: bytes) -> bool:
        try:
            metrics_log.points(metrics_log.decode(line))
        except ValueError:
            return False
        return True

    if (path / METRICS_LOG).is_file():
        _keep_lines(path / METRICS_LOG, is_line, note)
    else:
        note(f"{METRICS_LOG} was missing: it is made from what MLflow has")


def _keep_lines(log: Path, is_good: Callable[[bytes], bool], note: Callable[[str], None]) -> bool:
    """Keep the good lines of a log, and the others beside it; whether there were others."""
    lines = log.read_bytes().split(b"\n")
    good = [line for line in lines if line and is_good(line)]
    bad = [line for line in lines if line and not is_good(line)]
    if not bad:
        return False
    aside = log.with_name(f"{log.name}.damaged")
    with aside.open("ab") as handle:
        handle.writelines(line + b"\n" for line in bad)
    files.write_atomically(log, b"".join(line + b"\n" for line in good))
    note(f"{log.name}: {len(bad)} lines could not be read; they are in {aside.name} now")
    return True


def _repair_files(
    client: MlflowClient, run_id: str, path: Path, note: Callable[[str], None]
) -> list[str]:
    """Fetch configuration and environment of a training run, where they cannot be read."""
    if not tags.is_training_run(client.get_run(run_id).data.tags):
        return []
    remaining = []
    for name in (CONFIG, ENVIRONMENT):
        if _is_readable(path / name):
            continue
        with files.scratch(path) as scratch:
            try:
                fetched = download_artifact(client, run_id, name, scratch)
            except (MlflowException, OSError) as error:
                remaining.append(f"{name} cannot be read, and MLflow has none: {error}")
                continue
            if not _is_readable(fetched):
                remaining.append(f"{name} cannot be read, here or in MLflow")
                continue
            fetched.replace(path / name)
        note(f"{name} could not be read: it was fetched from MLflow")
    return remaining


def _is_readable(path: Path) -> bool:
    try:
        if path.name == CONFIG:
            from_json(path.read_bytes(), path.name)
        else:
            return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, ConfigError):
        return False
    return True


def _record_again(
    client: MlflowClient, run_id: str, path: Path, note: Callable[[str], None]
) -> None:
    """Record once more what the folder holds: files, the model, and the status that MLflow has."""
    run = client.get_run(run_id)
    log = EventLog(path)
    for name in (CONFIG, ENVIRONMENT, METRICS_LOG):
        if (path / name).is_file():
            log.put(records.Artifact(path=name, artifact=name))
    has_model = bool(run.outputs and run.outputs.model_outputs)
    bundles = sorted((path / MODELS).glob(f"*-*/{arrays.MANIFEST}"))
    bundle = bundles[-1].parent if bundles else path
    step, _, digest = bundle.name.partition("-")
    whole = run.data.tags.get(tags.WEIGHTS_DIGEST, "")
    if bundles and not has_model and whole.startswith(digest) and _is_readable(path / CONFIG):
        config = from_json((path / CONFIG).read_bytes(), CONFIG)
        dataset = run.data.tags.get(tags.DATASET, config.dataset or "")
        given = {
            key: value
            for key, value in run.data.tags.items()
            if key in (tags.DATASET, tags.DATASET_DIGEST, tags.WEIGHTS_DIGEST)
        }
        log.put(
            records.Model(
                bundle=bundle.relative_to(path).as_posix(),
                name=model_name(config, dataset, int(step)),
                at_step=int(step),
                prompts=[],
                tags=given,
                metrics=[],
                dataset=None,
            )
        )
        note(f"the model in {bundle.relative_to(path)} is logged again")
    if recorded_end(path) is None and run.info.status in ("FINISHED", "FAILED", "KILLED"):
        end = run.info.end_time or metrics_log.now()
        log.put(records.Status(status=run.info.status, end_time=end))
    log.close()
