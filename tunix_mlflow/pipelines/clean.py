"""Find and remove what processes left behind that died, or lost an answer of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store, tags
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record.folder import CHECKPOINTS, EVENT_LOG, is_open
from tunix_mlflow.tracking.runs import dead, lookup, resume
from tunix_mlflow.tracking.sync import lease


class Leftover(NamedTuple):
    """Something that nobody needs."""

    kind: str  # run, model, artifacts or files
    where: str  # MLflow's id, or a path
    text: str  # what it is
    bytes: int  # of files on this machine


class Cleaned(NamedTuple):
    """What was found."""

    leftovers: list[Leftover]
    removed: bool
    failed: list[str]  # why something was not removed, or not looked for


class _Found(NamedTuple):
    leftover: Leftover
    remove: Callable[[], object]


@store.restored()
def clean(*, remove: bool = False, reporter: Reporter = SILENT) -> Cleaned:
    """Find what dead processes left, and remove it.

    That is: runs that are RUNNING though their process is gone, which get a status; models that
    are PENDING or logged twice; checkpoints that are half there, here and in the artifact store;
    temporary files. What a run that is open, a registered version or a pending record needs is
    never touched.

    Args:
        remove: False: only find it.
        reporter: receives progress, and messages.
    """
    client, away = store.reach(TrackingConfig())
    failed = [] if away is None else [f"{away}: only files of this machine were looked for"]
    leftovers = []
    for found in _survey(client if away is None else None, failed, reporter):
        leftovers.append(found.leftover)
        if not remove:
            continue
        try:
            found.remove()
        except (MlflowException, UnavailableError, OSError) as error:
            failed.append(f"{found.leftover.where}: {one_line(error)}")
    return Cleaned(leftovers, remove, failed)


def _survey(client: MlflowClient | None, failed: list[str], reporter: Reporter) -> Iterator[_Found]:
    try:
        if client is not None:
            yield from _in_mlflow(client, reporter)
    except MlflowException as error:
        failed.append(f"MLflow was not searched to the end: {one_line(error)}")
    yield from _here()


def _in_mlflow(client: MlflowClient, reporter: Reporter) -> Iterator[_Found]:
    runs = list(lookup.search(client, f"tags.`{tags.VERSION}` LIKE '%'"))
    for number, run in enumerate(runs, start=1):
        reporter.progress("clean", number, len(runs), {})
        run_id = run.info.run_id
        if run.info.status == "RUNNING":
            if not _is_dead(client, run):
                continue
            text = "RUNNING, and its process is gone: it gets a status"
            yield _Found(
                Leftover("run", run_id, text, 0),
                partial(dead.end, client, run, paths.run_dir(run_id)),
            )
        for model, text in _models(client, run):
            found = Leftover("model", str(model.model_id), f"{text}, of run {run_id}", 0)
            yield _Found(found, partial(client.delete_logged_model, model.model_id))
        for artifact in _half_there(client, run):
            text = "a checkpoint without manifest"
            found = Leftover("artifacts", f"{run_id}/{artifact}", text, 0)
            yield _Found(found, partial(store.delete_artifacts, client, run_id, artifact))


def _is_dead(client: MlflowClient, run: Run) -> bool:
    """Whether nobody writes to a run that is RUNNING."""
    path = paths.run_dir(run.info.run_id)
    held = lease.holder(run.data.tags)
    if path.exists():
        if is_open(path):
            return False
        if held is not None and held.owner == lease.owner_of(path):
            return True  # this machine had it last
    return held is not None and lease.expired(client.get_run(run.info.run_id).data.tags)


def _models(client: MlflowClient, run: Run) -> Iterator[tuple[LoggedModel, str]]:
    """The models of a run that are not complete, or there twice."""
    path = paths.run_dir(run.info.run_id)
    if path.exists() and is_open(path):
        return
    models = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
    )
    if not models:
        return
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    needed = {str(version.source).removeprefix("models:/") for version in versions}
    needed |= {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
    complete = {_content(model) for model in models if model.model_id in needed}
    for model in models:
        if model.model_id in needed:
            continue
        if str(model.status) == "PENDING":
            yield model, "a model that is not complete"
        elif _content(model) in complete and tags.CONTENT_DIGEST in model.tags:
            yield model, "a model that is there twice"


def _content(model: LoggedModel) -> tuple[str | None, str | None]:
    return model.tags.get(tags.STEP), model.tags.get(tags.CONTENT_DIGEST)


def _half_there(client: MlflowClient, run: Run) -> list[str]:
    """The checkpoints in the artifact store whose manifest, which goes last, is missing."""
    run_id = run.info.run_id
    path = paths.run_dir(run_id)
    if not tags.is_training_run(run.data.tags) or (path.exists() and is_open(path)):
        return []
    whole = set(resume.uploaded_steps(client, run_id).values())
    return [
        entry.path
        for entry in store.list_artifacts(client, run_id, CHECKPOINTS)
        if Path(entry.path).name.isdigit() and entry.path not in whole
    ]


def _here() -> Iterator[_Found]:
    """Files on this machine."""
    snapshots = paths.snapshot_dir("0" * 64).parent
    for root in dict.fromkeys([paths.root(), paths.temporary_dir(), snapshots]):
        for path in files.leftovers(root):
            yield _of_files(path, "a temporary file of a process that is gone")
    for folder in lookup.folders():
        if is_open(folder):
            continue
        if not (folder / EVENT_LOG).exists() and folders.read_link(folder) is None:
            yield _of_files(folder, "the folder of a run that recorded nothing", folder)
            continue
        for path in dead.leftovers(folder):
            yield _of_files(path, "half written or half deleted, of a run that is not open", folder)


def _of_files(path: Path, text: str, run: Path | None = None) -> _Found:
    """A file or a folder; `run`: of the run with this folder."""
    found = Leftover("files", str(path), text, files.size_of(path))
    return _Found(found, partial(_remove, path, run))


def _remove(path: Path, run: Path | None) -> None:
    held = folders.lock(run) if run is not None else None  # it may have been opened meanwhile
    try:
        files.remove(path)
    finally:
        if held is not None:
            held.release()
    if path.exists():
        raise UnavailableError("it could not be deleted")
