"""Which checkpoints may be deleted, over all runs, here and in the artifact store.

Models are never touched, and neither is what something still needs: the checkpoint that a
registered version was made from, the two newest of a run that can be resumed, anything of a run
that is open, or of one that MLflow does not have as a training run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import LoggedModel, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.errors import IntegrityError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.models import arrays
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, is_open, read_link
from tunix_mlflow.tracking.runs import lookup, resume
from tunix_mlflow.tracking.sync import lease
from tunix_mlflow.training import checkpoint
from tunix_mlflow.training.checkpoint import Retention

HERE, UPLOADED = "here", "uploaded"


class Entry(NamedTuple):
    """One copy of one checkpoint."""

    run_id: str
    step: int
    where: str  # here or uploaded
    path: str  # a folder, or an artifact path
    bytes: int
    metrics: Mapping[str, float]
    kept: str | None  # why it stays; None: it may be deleted


class _Rule(NamedTuple):
    keep: str | None  # why all stay
    at_least: int  # the newest so many stay
    steps: set[int]  # these stay
    why: str


def survey(client: MlflowClient, retention: Retention, only: str | None = None) -> list[Entry]:
    """Return every checkpoint, and whether it may be deleted.

    Args:
        client: reaches store and registry.
        retention: what stays of a run that nothing else needs.
        only: this run alone.

    Raises:
        MlflowException: if MLflow does not answer.
    """
    needed = _registered(client)
    found: list[Entry] = []
    seen = set()
    every = lookup.search(client, tags.TRAINING_FILTER, view=ViewType.ALL)
    for run in (one for one in every if tags.is_training_run(one.data.tags)):
        run_id = run.info.run_id
        seen.add(run_id)
        if only is not None and run_id != only:
            continue
        rule = _rule(run, needed.get(run_id))
        folder = paths.run_dir(run_id)
        if folder.exists() and is_open(folder):
            rule = _Rule("the run is open", 0, set(), "")
        deleted = run.info.lifecycle_stage == "deleted"
        policy = Retention(0) if deleted and run_id not in needed else retention
        for entries in (_here(run_id), _uploaded(client, run_id)):
            found += _with_reasons(entries, rule, policy)
    for folder in lookup.folders():
        link = read_link(folder)
        run_id = link.run_id if link else folder.name
        if run_id not in seen and only in (None, run_id, folder.name):
            why = "it is no training run that MLflow has"
            found += [entry._replace(kept=why) for entry in _here(folder.name)]
    return found


def remove(client: MlflowClient, entry: Entry) -> None:
    """Delete a checkpoint that may be deleted.

    Raises:
        MlflowException: if MLflow does not answer.
        OSError: if the folder cannot be deleted.
    """
    assert entry.kept is None
    folder = paths.run_dir(entry.run_id)
    if entry.where == HERE:
        try:
            held = folders.lock(folder)
        except UnavailableError:
            return  # it was opened meanwhile, or another process deletes there
        try:
            if Path(entry.path).exists():
                checkpoint.remove(Path(entry.path))
        finally:
            held.release()
    elif not (folder.exists() and is_open(folder)):
        # First what says that it is whole: the rest may take many calls.
        store.delete_artifacts(client, entry.run_id, f"{entry.path}/{arrays.MANIFEST}")
        store.delete_artifacts(client, entry.run_id, entry.path)


def damage(client: MlflowClient, entry: Entry) -> str | None:
    """Return what is wrong with a checkpoint, file by file; None if nothing is."""
    with files.scratch(paths.temporary_dir()) as scratch:
        folder = Path(entry.path)
        try:
            if entry.where == UPLOADED:
                folder = download_artifact(client, entry.run_id, entry.path, scratch)
            arrays.check(folder)
        except (IntegrityError, MlflowException, OSError) as error:
            return one_line(error).replace(f"{scratch}/", "")
    return None


def _with_reasons(entries: list[Entry], rule: _Rule, retention: Retention) -> list[Entry]:
    entries = sorted(entries, key=lambda entry: entry.step)
    to_delete = set(checkpoint.to_delete([(e.step, e.metrics) for e in entries], retention))
    newest = {entry.step for entry in entries[max(0, len(entries) - rule.at_least) :]}
    found = []
    for entry in entries:
        why = rule.keep
        if why is None and (entry.step in newest or entry.step in rule.steps):
            why = rule.why
        if why is None and retention.keep_last and entry.step not in to_delete:
            why = "the retention keeps it"
        found.append(entry._replace(kept=why))
    return found


def _rule(run: Run, registered: set[int] | None) -> _Rule:
    info = run.info
    if registered is not None and not registered:
        return _Rule("a registered version refers to the run's files", 0, set(), "")
    if info.lifecycle_stage == "deleted":
        return _Rule(None, 0, registered or set(), "a registered version was made from it")
    if info.status == "RUNNING" and not lease.expired(run.data.tags):
        return _Rule("the run is open", 0, set(), "")
    if info.status != "FINISHED":
        return _Rule(None, 2, registered or set(), "the run can be resumed from it")
    if registered:
        return _Rule(None, 1, registered, "a registered version was made from it")
    return _Rule(None, 0, set(), "")


def _registered(client: MlflowClient) -> dict[str, set[int]]:
    """Run -> the steps of its registered models; none named: its files are referred to."""
    found: dict[str, set[int]] = {}
    token = None
    while True:
        page = client.search_model_versions(max_results=1000, page_token=token)
        for version in page:
            source = str(version.source or "")
            if source.startswith("models:/m-"):
                try:
                    model = client.get_logged_model(source.removeprefix("models:/"))
                    steps = _steps(client, model)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    continue  # deleted: there is nothing that it needs
                run_id = model.source_run_id or ""
                if steps and found.get(run_id, steps):
                    found.setdefault(run_id, set()).update(steps)
            elif version.run_id:
                found[version.run_id] = set()
        token = page.token
        if not token:
            return found


def _steps(client: MlflowClient, model: LoggedModel) -> set[int]:
    """The steps at which a run logged a model; none for a model of no run."""
    if not model.source_run_id:
        return set()
    run = client.get_run(model.source_run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    return {output.step for output in outputs if output.model_id == model.model_id}


def _here(run_id: str) -> list[Entry]:
    found = []
    for folder in checkpoint.sealed_checkpoints(paths.run_dir(run_id) / CHECKPOINTS):
        size = files.size_of(folder)
        found.append(
            Entry(run_id, int(folder.name), HERE, str(folder), size, _metrics(folder), None)
        )
    return found


def _uploaded(client: MlflowClient, run_id: str) -> list[Entry]:
    found = []
    for step, artifact in resume.uploaded_steps(client, run_id).items():
        manifest = f"{artifact}/{arrays.MANIFEST}"
        with tempfile.TemporaryDirectory() as scratch:
            try:
                download_artifact(client, run_id, manifest, Path(scratch))
            except (MlflowException, OSError):
                if store.has_artifact(client, run_id, manifest):
                    raise
                continue  # another process has just deleted it
            metrics = _metrics(Path(scratch) / artifact)
        size = _size(client, run_id, artifact)
        found.append(Entry(run_id, step, UPLOADED, artifact, size, metrics, None))
    return found


def _size(client: MlflowClient, run_id: str, artifact: str) -> int:
    total = 0
    for entry in store.list_artifacts(client, run_id, artifact):
        total += _size(client, run_id, entry.path) if entry.is_dir else int(entry.file_size or 0)
    return total


def _metrics(folder: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = arrays.content(folder).get("metrics", {})
    except IntegrityError:
        return {}  # `checkpoints verify` reports it
    return found
