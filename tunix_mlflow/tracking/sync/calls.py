"""From a record to calls of MLflow; delivering a record twice changes nothing.

A run is looked for by its local id before it is made, parameters keep their first value, tags and
artifacts their last, MLflow drops an input that it has.
"""

from __future__ import annotations

import json
import posixpath
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import mlflow
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

from tunix_mlflow import files, paths
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking import tags as names
from tunix_mlflow.tracking.record import records
from tunix_mlflow.tracking.record.cursor import refused_counts
from tunix_mlflow.tracking.record.folder import STAGED, RunLink, read_link, write_link
from tunix_mlflow.tracking.record.records import Record
from tunix_mlflow.tracking.sync import fence, logged_model
from tunix_mlflow.tracking.sync.answers import Undeliverable, understand

_Item = TypeVar("_Item", Param, RunTag)
_PER_REQUEST = 100  # params or tags
_TABLES_TAG = "mlflow.loggedArtifacts"
_SEAL = "manifest.json"


def deliver(
    client: MlflowClient, folder: Path, record: Record, report: Callable[[str], None]
) -> None:
    """Make the calls of one record.

    Args:
        client: reaches MLflow.
        folder: the run's.
        record: one of its records.
        report: called with params that the run has with another value.

    Raises:
        Undeliverable: when it, or a part of it, cannot be delivered.
        Exception: what the client raises; see :func:`answers.understand`.
    """
    if isinstance(record, records.Create):
        _create(client, folder, record)
        return
    link = read_link(folder)
    if link is None:
        raise ConnectionError(f"MLflow does not have the run of {folder} yet")
    run_id = link.run_id
    match record:
        case records.Params():
            _log_params(client, run_id, record, report)
        case records.Tags(tags=tags):
            cut = _cut(tags, MAX_TAG_VAL_LENGTH, report)
            items = [RunTag(key, value) for key, value in cut.items()]
            _log_each(items, lambda few: client.log_batch(run_id, tags=few))
        case records.DeleteTag(name=name):
            if name in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, name)
        case records.Input(dataset=dataset, tags=tags):
            given = [InputTag(key, value) for key, value in tags.items()]
            client.log_inputs(run_id, [DatasetInput(DatasetEntity(**dataset), given)])
        case records.ModelInput(model_id=model_id):
            inputs = client.get_run(run_id).inputs
            have = inputs.model_inputs if inputs else []
            if model_id not in {given.model_id for given in have}:
                client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
        case records.Launcher(run_id=launcher):
            client.set_tag(launcher, names.LAUNCHER_OF, run_id)
        case records.ExperimentKind():
            store.mark_experiment(client, link.experiment_id)
        case records.Artifact():
            _upload_file(client, folder, run_id, record)
        case records.Artifacts():
            _upload_folder(client, folder, run_id, record)
        case records.DeleteArtifact(artifact=artifact):
            store.delete_artifacts(client, run_id, artifact)
        case records.Model():
            logged_model.log_model(client, folder, link, record)
        case records.Begin():
            client.update_run(run_id, status="RUNNING")
        case records.Status():
            if record.run_id is None:
                mark_incomplete(client, folder, run_id)
            store.end_run(client, record.run_id or run_id, record.status, record.end_time)


def adopt(folder: Path, run_id: str, experiment_id: str) -> None:
    """Record that a folder belongs to this MLflow run, and make it findable by MLflow's id."""
    uri = store.public(mlflow.get_tracking_uri())
    before = read_link(folder)
    model_id = before.model_id if before is not None and before.run_id == run_id else None
    write_link(folder, RunLink(run_id, experiment_id, uri, model_id))
    alias = paths.run_dir(run_id)
    if folder != alias and not alias.exists():
        alias.symlink_to(folder.name)


def mark_incomplete(client: MlflowClient, folder: Path, run_id: str) -> None:
    """Set the tag that counts what MLflow refuses of a run; delete it if there is nothing."""
    counts = refused_counts(folder)
    text = ", ".join(f"{lane}: {count}" for lane, count in counts.items())
    before = client.get_run(run_id).data.tags.get(names.INCOMPLETE)
    if text and before != text:
        client.set_tag(run_id, names.INCOMPLETE, text)
    elif not text and before is not None:
        client.delete_tag(run_id, names.INCOMPLETE)


def _create(client: MlflowClient, folder: Path, record: records.Create) -> None:
    if read_link(folder) is not None:
        return
    experiment_id = store.find_experiment(client, record.experiment, record.experiment_id)
    local_id, tags = folder.name, record.tags
    found = client.search_runs([experiment_id], f"tags.`{names.LOCAL_ID}` = '{local_id}'")
    if found:  # a process died after it made the run
        run_id = found[0].info.run_id
    else:
        parent = record.parent
        if parent is not None:
            if paths.run_dir(parent).exists():
                above = read_link(paths.run_dir(parent))
                if above is None:
                    raise ConnectionError(f"MLflow does not have the parent run, {parent}, yet")
                parent = above.run_id
            tags = tags | {names.PARENT: parent}
        created = client.create_run(
            experiment_id,
            record.start_time,
            tags | {names.LOCAL_ID: local_id},
            run_name=record.name,
        )
        run_id = created.info.run_id
    adopt(folder, run_id, experiment_id)


def _log_params(
    client: MlflowClient, run_id: str, record: records.Params, report: Callable[[str], None]
) -> None:
    given = _cut(record.params, MAX_PARAM_VAL_LENGTH, report)
    have = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in given.items() if key not in have]
    if record.name_conflicts:
        other = [key for key in given if have.get(key, given[key]) != given[key]]
        conflicts = [
            f"{key} is {have[key][:80]!r} already, not {given[key][:80]!r}" for key in other
        ]
        if conflicts:
            report(f"not recorded in MLflow: params: {'; '.join(conflicts)}")
    _log_each(new, lambda few: client.log_batch(run_id, params=few))


def _cut(items: dict[str, str], limit: int, report: Callable[[str], None]) -> dict[str, str]:
    """Cut values to the characters that MLflow takes, and say so."""
    for key, value in items.items():
        if len(value) > limit:
            report(f"{key[:80]!r} has {len(value):,} characters; MLflow takes {limit:,} of them")
    return {key: value[:limit] for key, value in items.items()}


def _log_each(items: list[_Item], log: Callable[[list[_Item]], object]) -> None:
    """Log what MLflow takes of params or tags.

    Raises:
        Undeliverable: with what it refuses, and why.
    """
    refused: list[str] = []
    parts = [items[n : n + _PER_REQUEST] for n in range(0, len(items), _PER_REQUEST)]
    while parts:
        part = parts.pop(0)
        try:
            log(part)
        except Exception as error:
            answer = understand(error)
            if not answer.may_be_split:
                raise
            if len(part) == 1:
                refused.append(f"{part[0].key[:80]!r}: {answer.why}")
            else:
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
    if refused:
        raise Undeliverable("; ".join(refused))


def _upload_file(client: MlflowClient, folder: Path, run_id: str, record: records.Artifact) -> None:
    """Upload a file; a staged copy is deleted afterwards."""
    source = folder / record.path
    if not source.exists():
        _check_uploaded(client, run_id, record)
    else:
        try:
            # A copy: a metrics log grows while it is sent.
            with files.scratch(folder) as scratch:
                copy = scratch / Path(record.artifact).name
                shutil.copyfile(source, copy)
                client.log_artifact(run_id, str(copy), _parent(record.artifact))
        except FileNotFoundError:
            if source.exists():
                raise
    if record.is_table:
        # The UI finds tables by this tag, which MLflow's own log_table sets too.
        shown = json.loads(client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
        entry = {"path": record.artifact, "type": "table"}
        if entry not in shown:
            client.set_tag(run_id, _TABLES_TAG, json.dumps([*shown, entry]))
    delete_staged(folder, record)


def _upload_folder(
    client: MlflowClient, folder: Path, run_id: str, record: records.Artifacts
) -> None:
    """Upload the content of a folder.

    One that manifest.json seals replaces what is there under its name, and the manifest goes last:
    it says that all is there. Any other is merged with what is there, as MLflow does.
    """
    source, artifact = folder / record.path, record.artifact
    if not source.exists():
        _check_uploaded(client, run_id, record)
        return
    try:
        if not artifact or not (source / _SEAL).exists():
            client.log_artifacts(run_id, str(source), artifact or None)
        else:
            # Another of the same name would leave files that are not in the manifest.
            store.delete_artifacts(client, run_id, artifact)
            for child in sorted(source.iterdir(), key=lambda child: child.name == _SEAL):
                fence.check()  # for stores that the hook does not see
                if child.is_dir():
                    client.log_artifacts(run_id, str(child), f"{artifact}/{child.name}")
                else:
                    client.log_artifact(run_id, str(child), artifact)
    except FileNotFoundError:
        if source.exists():
            raise
    delete_staged(folder, record)


def _check_uploaded(
    client: MlflowClient, run_id: str, record: records.Artifact | records.Artifacts
) -> None:
    """Check that MLflow has what a run's folder has no more.

    Raises:
        Undeliverable: if not; a file of the folder's own may also have been replaced.
    """
    if not record.path.startswith(f"{STAGED}/"):
        return
    artifacts = [record.artifact]
    if isinstance(record, records.Artifacts):
        artifacts = [posixpath.join(record.artifact, name) for name in record.names]
    if not all(store.has_artifact(client, run_id, artifact) for artifact in artifacts):
        raise Undeliverable(f"its copy in the run's folder, {record.path}, is gone")


def _parent(artifact: str) -> str | None:
    parent = Path(artifact).parent
    return None if parent == Path() else str(parent)


def delete_staged(folder: Path, record: Record) -> None:
    """Delete the copy that was made of a record's artifact, if there is one."""
    path = getattr(record, "path", "")
    if path.startswith(f"{STAGED}/"):
        for _ in range(2):  # a deletion may fail once, and nobody would try it again
            shutil.rmtree(folder / STAGED / path.split("/")[1], ignore_errors=True)
