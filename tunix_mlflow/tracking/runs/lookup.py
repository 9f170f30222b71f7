"""Runs that exist: which can go on, how, and what another machine knows of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.config.identity import differences
from tunix_mlflow.config.load import from_json
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import CheckpointError, ConfigError, IntegrityError, TrackingError
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.record import event_log, metrics_log
from tunix_mlflow.tracking.record.event_log import Cursor
from tunix_mlflow.tracking.sync import delivery, lease

CHECKPOINTS = "checkpoints"


class Described(NamedTuple):
    """A training run."""

    run_id: str
    config: Config
    environment: dict[str, str]
    status: str | None  # None: it was cut off, and MLflow is away
    client: MlflowClient | None  # None: MLflow is away


class NotDescribed(TrackingError):
    """A run that died before it recorded its configuration."""


class Keyed(NamedTuple):
    """The run that has a key."""

    run_id: str
    finished: bool


def to_resume(
    run_id: str, change: Callable[[Config], Config] = lambda before: before, *, fork: bool = False
) -> Described:
    """Configuration and environment of a training run that can go on.

    They are read from the run's local folder, else from its artifacts.

    Args:
        run_id: MLflow's, or the name of a folder that MLflow has not heard of.
        change: from the run's configuration to the one to go on with; what may change is told
            by `configs.FREE`.
        fork: a new run will begin where this one is; then anything may change.

    Raises:
        TrackingError: if there is no such run, it is no training run, it has finished, or what
            may not change would.
    """
    found = look_up(run_id)
    config = change(found.config)
    longer = config.training.steps > found.config.training.steps
    if found.status == "FINISHED" and not longer and not fork:
        raise TrackingError(
            f"run {found.run_id} has finished; there is nothing to resume. More steps go on with"
            f" it: training.steps={2 * found.config.training.steps}"
        )
    if not fork and (changed := differences(found.config, config)):
        raise TrackingError(
            f"run {found.run_id} cannot go on with {'; '.join(changed)}; leave it as it was,"
            " or start a run of its own from there with --fork"
        )
    return found._replace(config=config)


def look_up(run_id: str) -> Described:
    """A training run of ours, by MLflow's id or the name of a folder.

    Raises:
        NotDescribed: if it died before it recorded its configuration.
        TrackingError: if there is none, or MLflow is away and it is not on this machine.
    """
    if not run_id.isalnum():
        raise TrackingError(f"{run_id[:80]!r} is no run id: expected 32 hex digits")
    folder = paths.run_dir(run_id)
    local = folder / "config.json"
    try:
        found = from_json(local.read_bytes(), str(local)) if local.is_file() else Config()
    except OSError as error:
        raise TrackingError(f"cannot read {local}: {error.strerror}") from error
    client, away = store.reach(found.tracking)
    if away is not None:
        if not local.is_file():
            raise TrackingError(f"{away}, and run {run_id} is not on this machine")
        if _recorded_tags(folder).get("tunix_mlflow.stage") != "train":
            raise TrackingError(f"run {run_id} is not a training run")
        status = _recorded_status(folder)
        names = ("config.json", "environment.json")
        if not all((folder / name).is_file() for name in names):
            raise NotDescribed(f"run {run_id} died before it could record its configuration")
        texts = [(folder / name).read_bytes() for name in names]
    else:
        if (folder / event_log.EVENT_LOG).exists() and event_log.known(folder) is None:
            if is_open(folder):
                raise TrackingError(f"run {run_id} is open in another process on this machine")
            catch_up(client, folder, lambda _: None)  # it began while the server was away
        known = event_log.known(folder)
        run_id = known.run_id if known else run_id
        run = _training_run(client, run_id)
        status = run.info.status
        texts = _described(client, run_id, folder)
    return Described(
        run_id,
        from_json(texts[0], f"config.json of run {run_id}"),
        {k: str(v) for k, v in json.loads(texts[1]).items()},
        status,
        client if away is None else None,
    )


def of_key(config: Config) -> Keyed | None:
    """The newest training run with `tracking.key`.

    Raises:
        TrackingError: if the store cannot be used.
    """
    key = config.tracking.key
    client, away = store.reach(config.tracking)
    if away is None:
        experiments = [e.experiment_id for e in client.search_experiments()]
        where = f"tags.`tunix_mlflow.key` = '{key}' and tags.`tunix_mlflow.stage` = 'train'"
        order = ["attributes.start_time DESC"]
        found = client.search_runs(experiments, where, order_by=order, max_results=1)
        if found:
            return Keyed(found[0].info.run_id, found[0].info.status == "FINISHED")
    for folder in folders():
        try:
            own = from_json((folder / "config.json").read_bytes(), str(folder))
        except (OSError, ConfigError):
            continue  # not far enough to have one
        if _recorded_tags(folder).get("tunix_mlflow.stage") != "train":
            continue
        if own.tracking.key == key and (away is not None or event_log.known(folder) is None):
            return Keyed(folder.name, _recorded_status(folder) == "FINISHED")
    return None


def tag_launcher(run_id: str) -> None:
    """Say of the run that `mlflow run` made for this process, if any, that it was for another."""
    launched = os.environ.get("MLFLOW_RUN_ID")
    if launched is not None and launched != run_id:
        MlflowClient().set_tag(launched, store.LAUNCHER_TAG, run_id)


def training_runs(client: MlflowClient, limit: int) -> list[Run]:
    """The newest training runs of all experiments, without mere launchers."""
    experiments = [e.experiment_id for e in client.search_experiments(max_results=1000)]
    found: list[Run] = []
    token = None
    while len(found) < limit:
        page = client.search_runs(
            experiments,
            "tags.`tunix_mlflow.stage` = 'train'",
            order_by=["attributes.start_time DESC"],
            max_results=min(1000, limit),
            page_token=token,
        )
        found += [run for run in page if store.LAUNCHER_TAG not in run.data.tags]
        token = page.token
        if not token:
            break
    return found[:limit]


def _end_dead(client: MlflowClient, run_id: str) -> None:
    """Give a run its status whose process died before it could record one."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_tag(
            run_id, "tunix_mlflow.error", f"its process died; tunix-mlflow resume {run_id}"
        )
        client.set_terminated(run_id, "KILLED")


def folders() -> list[Path]:
    """The run folders of this state root, each once, the newest first."""
    root = paths.run_dir("")
    found = (
        [p for p in root.iterdir() if p.is_dir() and not p.is_symlink()] if root.exists() else []
    )
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def forked(folder: Path, client: MlflowClient | None, run_id: str) -> bool:
    """Whether a run began where another one was."""
    tags = _recorded_tags(folder)
    if client is not None:
        tags |= client.get_run(run_id).data.tags
    return "tunix_mlflow.forked_from" in tags


def is_open(folder: Path) -> bool:
    """Whether a process on this machine has the run open."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def sync(client: MlflowClient, folder: Path, report: Callable[[str], None]) -> int:
    """Tell MLflow what a folder holds, and of the run's end if its process died.

    Returns:
        Bytes that were delivered.

    Raises:
        TrackingError: if it is open, another server's, or another machine went on with it; or when
            the server goes away meanwhile.
    """
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrackingError(
            f"run {folder.name} is open in another process, which tells MLflow itself"
        ) from error
    try:
        known = event_log.known(folder)
        here = store.public(mlflow.get_tracking_uri())
        if known is not None and known.tracking_uri != here:
            raise TrackingError(
                f"run {known.run_id} is recorded in {known.tracking_uri}, not in {here}; set"
                " MLFLOW_TRACKING_URI"
            )
        if known is not None:
            held = lease.holder(client.get_run(known.run_id).data.tags)
            if held is not None and held[0] != lease.owner_of(folder):
                raise TrackingError(
                    f"run {known.run_id} went on elsewhere; what is here is told when it is"
                    " resumed here"
                )
        told = catch_up(client, folder, report)
        known = event_log.known(folder)
        if known is not None and _recorded_status(folder) is None:
            _end_dead(client, known.run_id)
        return told
    except MlflowException as error:
        raise TrackingError(f"run {folder.name}: {store.one_line(error)}") from error
    finally:
        lock.release()


def catch_up(client: MlflowClient, folder: Path, report: Callable[[str], None]) -> int:
    """Tell MLflow what a folder holds.

    Returns:
        Bytes that were delivered.

    Raises:
        TrackingError: when the server goes away meanwhile.
    """
    before = event_log.waiting(folder)
    try:
        while delivery.step(client, folder, report):
            pass
    except Exception as error:
        raise TrackingError(
            f"MLflow did not take all of {folder}: {store.one_line(error)}; nothing is lost, try"
            " again"
        ) from error
    return before - event_log.waiting(folder)


def refill(client: MlflowClient, run_id: str, folder: Path, report: Callable[[str], None]) -> None:
    """Bring a run's folder up to what MLflow knows: other machines may have gone on with it.

    Metrics come with MLflow's own timestamps, so that telling it again doubles nothing.

    Raises:
        MlflowException: if MLflow does not answer.
    """
    path = folder / metrics_log.METRICS_LOG
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        points = []
        if metrics_log.METRICS_LOG in {found.path for found in client.list_artifacts(run_id)}:
            kept = Path(client.download_artifacts(run_id, metrics_log.METRICS_LOG, scratch))
            if path.exists():
                points = [p for line in metrics_log.read(kept) for p in metrics_log.points(line)]
            else:
                kept.replace(path)
        points += history(client, run_id)  # of two with one name and step, MLflow's counts
        event_log.move_cursor(folder, Cursor(event_log.cursor(folder).outbox, 0))
        if metrics_log.merge(path, points):
            report(f"run {run_id}: its history was completed from MLflow")
    fetch_checkpoint(client, run_id, folder, report)


def history(
    client: MlflowClient, run_id: str, keys: Collection[str] | None = None
) -> list[metrics_log.Point]:
    """Every point that MLflow has of a run, or of some of its metrics."""
    have = client.get_run(run_id).data.metrics
    return [
        metrics_log.Point(m.key, m.value, m.timestamp, m.step)
        for key in have
        if keys is None or key in keys
        for m in client.get_metric_history(run_id, key)
    ]


def mark_stale(client: MlflowClient, experiment_id: str) -> list[str]:
    """End runs whose process died without a word: RUNNING, and their lease is over.

    Returns:
        Their ids.
    """
    found = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    stale = [
        run.info.run_id
        for run in found
        if lease.holder(run.data.tags) is not None and lease.expired(run.data.tags)
    ]
    # Not one that somebody went on with meanwhile.
    dead = [one for one in stale if lease.expired(client.get_run(one).data.tags)]
    for run_id in dead:
        _end_dead(client, run_id)
    return dead


def uploaded_steps(client: MlflowClient, run_id: str) -> dict[int, str]:
    """Step -> artifact path of each checkpoint that was uploaded whole."""
    found = {}
    for entry in client.list_artifacts(run_id, CHECKPOINTS):
        name = Path(entry.path).name
        if entry.is_dir and name.isdigit():
            inside = {Path(file.path).name for file in client.list_artifacts(run_id, entry.path)}
            if "manifest.json" in inside:  # which goes last
                found[int(name)] = entry.path
    return found


def need_checkpoint(run: Described, step: int | None, report: Callable[[str], None]) -> None:
    """Make sure that a run's checkpoint is here: of a step, or the newest.

    Raises:
        CheckpointError: if there is none, here or in MLflow.
    """
    from tunix_mlflow.training import checkpoint

    folder = paths.run_dir(run.run_id)
    if run.client is not None:
        fetch_checkpoint(run.client, run.run_id, folder, report, step)
    have = [int(path.name) for path in checkpoint.steps(folder / CHECKPOINTS)]
    if not have or (step is not None and step not in have):
        listed = ", ".join(map(str, have)) or "none"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"run {run.run_id} has {what}; there are: {listed}")


def fetch_checkpoint(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    report: Callable[[str], None],
    wanted: int | None = None,
) -> None:
    """Download a checkpoint that is whole, unless it is here.

    Args:
        client: reaches MLflow.
        run_id: the run.
        folder: its folder here.
        report: told of what was fetched, and of what is damaged.
        wanted: the step; None: the newest, unless a newer one is here.
    """
    from tunix_mlflow.models import arrays
    from tunix_mlflow.training import checkpoint

    place = folder / CHECKPOINTS
    have = {int(path.name) for path in checkpoint.steps(place)}
    if wanted in have:
        return
    for step, artifact in sorted(uploaded_steps(client, run_id).items(), reverse=True):
        if wanted is None and step <= max(have, default=-1):
            return
        if wanted not in (None, step):
            continue
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fetched = Path(client.download_artifacts(run_id, artifact, scratch))
            try:
                arrays.check(fetched)
            except IntegrityError as error:
                report(f"the uploaded checkpoint of step {step} is damaged ({error}); not used")
                continue
            final = place / fetched.name
            if final.exists():
                shutil.rmtree(final)  # one that was never sealed
            fetched.rename(final)
        report(f"run {run_id}: fetched the checkpoint of step {step} from MLflow")
        return


def _training_run(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"there is no run {run_id!r}: {store.one_line(error)}") from error
    tags = run.data.tags
    if store.LAUNCHER_TAG in tags:
        target = tags[store.LAUNCHER_TAG]
        raise TrackingError(f"run {run_id} only launched run {target}; resume that one")
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(f"run {run_id} was deleted; restore it in MLflow first")
    if tags.get("tunix_mlflow.stage") != "train" or "tunix_mlflow.dataset_digest" not in tags:
        raise TrackingError(f"run {run_id} is not a training run of ours; see it in the UI")
    return run


def _described(client: MlflowClient, run_id: str, folder: Path) -> list[bytes]:
    texts = []
    with tempfile.TemporaryDirectory() as fetched:
        for name in ("config.json", "environment.json"):
            path = folder / name
            if not path.is_file():
                try:
                    path = Path(client.download_artifacts(run_id, name, fetched))
                except (MlflowException, OSError) as error:
                    raise NotDescribed(
                        f"run {run_id} has no {name}, here or in MLflow: it died before it could"
                        f" record it; start a new run ({store.one_line(error)})"
                    ) from error
            texts.append(path.read_bytes())
    return texts


def _recorded_status(folder: Path) -> str | None:
    """The status that was last recorded in a folder; None for a run that was cut off."""
    status = None
    for record in _records(folder):
        if record["op"] in ("create", "params"):  # a part begins
            status = None
        if record["op"] == "status" and record.get("run_id") is None:
            status = record["status"]
    return status


def _recorded_tags(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in _records(folder):
        found |= record["tags"] if record["op"] in ("create", "tags") else {}
    return found


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for raw in event_log.whole_lines(folder / event_log.EVENT_LOG).splitlines():
        yield json.loads(raw)
