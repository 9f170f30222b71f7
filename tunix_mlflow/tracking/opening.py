"""How a run begins: made in MLflow, attached to one that exists, or recorded here until MLflow is
back."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import mlflow
from filelock import FileLock
from mlflow.entities import Run, RunInfo
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from tunix_mlflow import paths
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.runtime import git
from tunix_mlflow.tracking import active, store, tags
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record import marker, records
from tunix_mlflow.tracking.record.event_log import EventLog
from tunix_mlflow.tracking.record.folder import METRICS_LOG, REFILL
from tunix_mlflow.tracking.record.marker import About, Marker
from tunix_mlflow.tracking.record.metrics_log import now
from tunix_mlflow.tracking.runs import dead, lookup, resume
from tunix_mlflow.tracking.sync import calls, lease
from tunix_mlflow.tracking.sync.lease import Lease


class Request(NamedTuple):
    """The run that is asked for."""

    run_id: str | None  # continue this one
    launched: str | None  # the run that `mlflow run` made, taken where no other is continued
    name: str | None
    key: str | None  # continue the unfinished run with this key, if `resume`
    resume: bool
    experiment: str | None
    experiment_id: str | None
    parent: str | None  # MLflow's id, or the name of a folder that MLflow does not have
    tags: Mapping[str, str]
    lease_seconds: float
    mark_stale: bool  # end runs of the experiment whose process died
    take_over: str | None = None  # why another process's lease is not waited for


class Opened(NamedTuple):
    """A run that can be recorded."""

    folder: Path
    lock: FileLock
    info: RunInfo
    lease: Lease | None  # None: MLflow is away
    marker: Marker
    attached: bool  # it existed before


def open_folder(
    client: MlflowClient, away: str | None, request: Request, report: Callable[[str], None]
) -> Opened:
    """Make or attach the run, here if MLflow is away, and open its folder.

    Args:
        client: reaches MLflow.
        away: why it does not answer; None if it does.
        request: which run.
        report: receives one-line messages.

    Raises:
        UnavailableError: if the run is open in another process, or is neither here nor reachable.
        TrackingError: if there is no such run, or it was made with other digests.
    """
    _check_state_root()
    if away is None:
        try:
            return _open_online(client, request, report)
        except MlflowException as error:
            away = store.went_away(error)
            if away is None:
                raise store.failure(error, "cannot start the run") from error
    return _open_away(away, request, report)


def take_launched() -> str | None:
    """Take the run that `mlflow run` made for this process out of the environment, if any."""
    return os.environ.pop("MLFLOW_RUN_ID", None)


def context_tags(own: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that MLflow gives every run (user, source), git's, and our own."""
    return {k: str(v) for k, v in resolve_tags(commit_tags() | dict(own)).items()}


def commit_tags() -> dict[str, str]:
    """Return the tags of the git commit; none where there is no git or no work tree."""
    found = git.commit()
    if found is None:
        return {}
    dirty = {} if found.is_dirty is None else {tags.GIT_DIRTY: str(found.is_dirty).lower()}
    return {tags.GIT_COMMIT: found.digest} | dirty


def _open_online(client: MlflowClient, request: Request, report: Callable[[str], None]) -> Opened:
    if request.mark_stale:
        dead.mark(client, report)
    run_id = request.run_id
    experiment_id = None
    if run_id is None and request.resume and request.key is not None:
        experiment_id = store.find_experiment(client, request.experiment, request.experiment_id)
        run_id = lookup.unfinished_of_key(client, experiment_id, request.key, report)
    run_id = run_id or request.launched
    if run_id is None and experiment_id is None:
        experiment_id = store.find_experiment(client, request.experiment, request.experiment_id)
    if run_id is not None:
        opened = _attach(client, run_id, request, report)
    else:
        assert experiment_id is not None
        opened = _create(client, experiment_id, request, report)
    if request.mark_stale:
        try:
            for ended in resume.mark_stale(client, opened.info.experiment_id):
                report(dead.describe(*ended))
        except MlflowException as error:
            report(f"runs whose process died were not looked for: {one_line(error)}")
    return opened


def _create(
    client: MlflowClient, experiment_id: str, request: Request, report: Callable[[str], None]
) -> Opened:
    owner, begun = lease.new_owner(), lease.now()
    given = dict(request.tags) | lease.tag(owner, request.lease_seconds)
    parent = request.parent
    if parent is not None and paths.run_dir(parent).exists():
        link = folders.read_link(paths.run_dir(parent))
        parent = None if link is None else link.run_id
    if parent is not None:
        given[tags.PARENT] = parent
    about = About(store.public(mlflow.get_tracking_uri()), experiment_id)
    with contextlib.ExitStack() as undo:
        placed = marker.place(owner, about)
        undo.callback(placed.release, remove=False)  # MLflow may have a run: the answer was lost
        run = _create_run(client, experiment_id, context_tags(given), request.name)
        run_id = run.info.run_id
        undo.callback(_give_up, client, run_id)
        folder = paths.run_dir(run_id)
        lock = folders.lock(folder)
        undo.callback(lock.release)
        lease.record_owner(folder, owner)
        calls.adopt(folder, run_id, run.info.experiment_id)
        undo.pop_all()
    held = Lease(client, run_id, owner, request.lease_seconds, begun)
    return Opened(folder.resolve(), lock, run.info, held, placed, False)


def _create_run(
    client: MlflowClient, experiment_id: str, given: dict[str, str], name: str | None
) -> Run:
    """Make a run, and only one if an answer of MLflow is lost."""
    try:
        with active.no_retries():
            return client.create_run(experiment_id, tags=given, run_name=name)
    except MlflowException:
        made = client.search_runs([experiment_id], f"tags.`{tags.LEASE}` = '{given[tags.LEASE]}'")
        if made:
            return made[0]
        return client.create_run(experiment_id, tags=given, run_name=name)


def _attach(
    client: MlflowClient, run_id: str, request: Request, report: Callable[[str], None]
) -> Opened:
    run_id = lookup.mlflow_id(client, run_id, report)
    run = client.get_run(run_id)
    before = run.data.tags
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(f"run {run_id} was deleted; restore it in MLflow first")
    stage = request.tags.get(tags.STAGE)
    if stage is not None and before.get(tags.STAGE, stage) != stage:
        remedy = "; unset MLFLOW_RUN_ID" if run_id == request.launched else ""
        raise TrackingError(
            f"run {run_id} is of the stage {before[tags.STAGE]}, and cannot be continued as"
            f" {stage}{remedy}"
        )
    _check_digests(before, request.tags, run_id)
    folder = paths.run_dir(run_id).resolve()
    with contextlib.ExitStack() as undo:
        lock = folders.lock(folder)
        undo.callback(lock.release)
        placed = _place_marker(folder)
        undo.callback(placed.release, remove=False)
        held_here = _owner(before) == lease.owner_of(folder)
        refill = folder / REFILL  # stays when this process dies before it is done
        if tags.VERSION in before and not (held_here and (folder / METRICS_LOG).exists()):
            refill.touch()
        taken = request.take_over is not None
        held = lease.acquire(client, run_id, folder, request.lease_seconds, report, take_over=taken)
        if request.take_over is not None:
            client.set_tag(run_id, tags.TAKEN_OVER, request.take_over[:500])
        if refill.exists():
            resume.refill(client, run_id, folder, report)
            refill.unlink()
        client.update_run(run_id, status="RUNNING")
        calls.adopt(folder, run_id, run.info.experiment_id)
        undo.pop_all()
    return Opened(folder, lock, run.info, held, placed, True)


def _open_away(away: str, request: Request, report: Callable[[str], None]) -> Opened:
    run_id = request.run_id
    if run_id is None and request.resume and request.key is not None:
        run_id = lookup.unfinished_of_key(None, None, request.key, report)
    run_id = run_id or request.launched
    folder = paths.run_dir(run_id or uuid.uuid4().hex)
    if run_id is not None and not (folder / METRICS_LOG).exists():
        raise UnavailableError(f"{away}, and run {run_id} is not on this machine")
    lock = folders.lock(folder)
    folder = folder.resolve()
    placed = _place_marker(folder)
    report(f"{away}: recording in {folder}; pending records are uploaded when it is back")
    if run_id is None:
        events = EventLog(folder)
        events.put(
            records.Create(
                name=request.name,
                experiment=request.experiment,
                experiment_id=request.experiment_id,
                tags=context_tags(request.tags),
                parent=request.parent,
                start_time=now(),
            )
        )
        events.close()
    link = folders.read_link(folder)
    info = RunInfo(
        run_id=link.run_id if link else folder.name,
        experiment_id=link.experiment_id if link else (request.experiment_id or ""),
        user_id="",
        status="RUNNING",
        start_time=now(),
        end_time=None,
        lifecycle_stage="active",
        run_name=request.name,
    )
    return Opened(folder, lock, info, None, placed, run_id is not None)


def _place_marker(folder: Path) -> Marker:
    about = About(store.public(mlflow.get_tracking_uri()), folder=folder.name)
    return marker.place(lease.owner_of(folder), about)


def _owner(given: Mapping[str, str]) -> str | None:
    held = lease.holder(given)
    return None if held is None else held.owner


def _give_up(client: MlflowClient, run_id: str) -> None:
    """End a run that was made and could not be opened."""
    with contextlib.suppress(Exception):
        store.end_run(client, run_id, "FAILED")


def _check_state_root() -> None:
    try:
        paths.root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(
            f"cannot use the state root {paths.root()}: {one_line(error)};"
            f" set {paths.HOME_VARIABLE} to another folder"
        ) from error


def _check_digests(stored: Mapping[str, str], given: Mapping[str, str], run_id: str) -> None:
    for name, value in given.items():
        if not name.endswith("_digest") or name == tags.CONFIG_DIGEST:
            continue
        if stored.get(name, value) != value:
            raise TrackingError(
                f"run {run_id} was made with another {name.removeprefix(tags.PREFIX)}"
                f" ({stored[name][:16]}, now {value[:16]}); start a new run"
            )
