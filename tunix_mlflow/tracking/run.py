"""A run session: everything that a training loop, ours or another, records in MLflow.

    with session(config, stage="train") as run:
        run.log_dataset(manifest, "train", usage="training")
        for step in ...:
            run.write_scalars(step, {"train/loss": loss})

Everything goes to the run's folder first, and from there to MLflow in the background: no step
waits for a server, and a server that is away costs nothing but a later `tunix-mlflow sync`.
Whichever way the block ends, the run gets its status: FINISHED, FAILED with the message in
the tag `tunix_mlflow.error`, or KILLED by a signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import msgspec
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import __version__, paths
from tunix_mlflow.config.identity import config_digest, flatten, to_json
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import Interrupted, TrackingError
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.plugins import context
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.record import event_log
from tunix_mlflow.tracking.record.event_log import EventLog
from tunix_mlflow.tracking.record.metrics_log import METRICS_LOG, MetricsLog, read, summary
from tunix_mlflow.tracking.record.system_metrics import SystemMetrics
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.sync import delivery, lease
from tunix_mlflow.tracking.sync.worker import SyncWorker

_INSIST_SECONDS = 2.0
_open: list[RunSession] = []  # of this process, the innermost last


def to_stderr(message: str) -> None:
    """Where a session's messages go unless told otherwise."""
    print(f"tunix-mlflow: {message}", file=sys.stderr, flush=True)


class RunSession:
    """One open run. Made by :func:`session`; a MetricWriter."""

    def __init__(
        self,
        client: MlflowClient,
        folder: Path,
        lock: FileLock,
        report: Callable[[str], None],
        lease_seconds: float,
    ) -> None:
        self.client, self.folder, self.report = client, folder, report
        self.outbox = EventLog(folder)
        self.journal = MetricsLog(folder / METRICS_LOG, report)
        self.shipper = SyncWorker(folder, client, report, lease_seconds, self._lost)
        self._lock = lock
        self.taken = False

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; while MLflow has not heard of it, the folder's name."""
        known = event_log.known(self.folder)
        return known.run_id if known else self.folder.name

    @property
    def experiment_id(self) -> str | None:
        """The run's experiment; None while MLflow has not heard of it."""
        known = event_log.known(self.folder)
        return known.experiment_id if known else None

    @property
    def model_id(self) -> str | None:
        """The logged model; None while MLflow has not heard of it."""
        known = event_log.known(self.folder)
        return known.model_id if known else None

    @property
    def link(self) -> str:
        """The run's page in the UI; its folder while there is none."""
        if self.experiment_id is None:
            return str(self.folder)
        return store.run_link(self.experiment_id, self.run_id)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record metrics of one step; returns after one write to a local file.

        Raises:
            TrackingError: when another process has taken up the run.
        """
        if self.taken:
            raise TrackingError(
                f"run {self.run_id} was taken up by another process while this one was silent;"
                " this one stops"
            )
        self.journal.write_scalars(step, scalars)

    def flush(self) -> None:
        """Make the local record durable."""
        self.journal.flush()

    def sync(self) -> bool:
        """Wait until MLflow has what was recorded so far, as long as it answers.

        Returns:
            Whether it has.
        """
        return self.shipper.drain()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; one that the run has already keeps its spelling."""
        self._put("params", params={key: str(value) for key, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; later values win."""
        self._put("tags", tags={key: str(value) for key, value in tags.items()})

    def log_dataset(self, manifest: Manifest, split: str, *, usage: str) -> tuple[str, str]:
        """Record one split as an input of the run.

        Args:
            manifest: the dataset.
            split: its split.
            usage: MLflow's context of the input, for example training.

        Returns:
            Name and digest by which MLflow knows it.
        """
        entity = TunixMlflowDataset(manifest, split)._to_mlflow_entity()
        self._put("dataset", dataset=dict(entity), usage=usage)
        return entity.name, entity.digest

    def log_model_input(self, model_id: str) -> None:
        """Record that the run used a logged model."""
        self._put("model_input", model_id=model_id)

    def log_text(self, text: str, artifact: str) -> None:
        """Store a text as an artifact."""
        self.outbox.put_text(text, artifact)
        self.shipper.wake()

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Store a file of the run's folder as an artifact."""
        artifact = f"{folder}/{path.name}" if folder else path.name
        self._put("artifact", path=self._below(path), artifact=artifact)

    def log_folder(self, path: Path, artifact: str) -> None:
        """Store the content of a folder in the run's folder as an artifact folder."""
        self._put("artifact", path=self._below(path), artifact=artifact)

    def remove_artifact(self, artifact: str) -> None:
        """Delete an artifact of the run."""
        self._put("no_artifact", artifact=artifact)

    def log_table(self, columns: Mapping[str, Sequence[Any]], artifact: str) -> None:
        """Store a table that the UI shows as one; it replaces one of the same name.

        Args:
            columns: name -> values, all of equal length.
            artifact: path that ends in .json.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        table = {"columns": list(columns), "data": rows}
        self.log_text(json.dumps(table, ensure_ascii=False), artifact)
        self._put("table", artifact=artifact)

    def log_note(self, markdown: str) -> None:
        """Write the description on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_summary(self, step: int) -> dict[str, float]:
        """Record the six summary figures, as far as the run has come.

        Returns:
            The figures, empty if the run has no training loss.
        """
        figures = summary(read(self.folder / METRICS_LOG))
        if figures:
            self.write_scalars(step, figures)
        return figures

    def last(self, key: str) -> dict[str, float]:
        """The latest value of a metric as {key: value}; empty if it was never written."""
        found: dict[str, float] = {}
        for line in read(self.folder / METRICS_LOG):
            if key in line.get("metrics", {}):
                found[key] = line["metrics"][key]
        return found

    def log_figures(
        self,
        figures: Mapping[str, float],
        *,
        model_id: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Record final figures at once, tied to a logged model and a dataset.

        Args:
            figures: metric -> value.
            model_id: the logged model they belong to.
            dataset: MLflow's name and digest of the dataset they were measured on.
        """
        self._put(
            "figures",
            figures=dict(figures),
            timestamp=delivery.now(),
            model_id=model_id,
            dataset=list(dataset) if dataset else None,
        )

    def log_model(
        self,
        bundle: Path,
        *,
        step: int,
        prompts: Sequence[str],
        tags: Mapping[str, str],
    ) -> None:
        """Log the run's model.

        Args:
            bundle: a folder below the run's, written by `bundles.save`.
            step: after how many updates.
            prompts: an input example.
            tags: the logged model's tags; `tunix_mlflow.weights_digest` is the bundle's.
        """
        self._put(
            "model",
            bundle=self._below(bundle),
            at_step=step,
            prompts=list(prompts),
            tags=dict(tags),
        )

    def end(self, status: str, *, launcher: str | None) -> bool:
        """Record the status, tell MLflow what is left, and close the files.

        Returns:
            Whether MLflow has everything.
        """
        try:
            self.journal.close()
            if self.taken:
                event_log.skip(self.folder)  # the run is another's to tell of
                return True
            self._put("artifact", path=METRICS_LOG, artifact=METRICS_LOG)
            for run_id in (None, launcher) if launcher else (None,):
                self._put("status", status=status, end_time=delivery.now(), run_id=run_id)
            done = self.shipper.drain()
            if done and self.shipper.lease is not None:
                with contextlib.suppress(Exception):  # it ends by itself
                    self.shipper.lease.release()
            return done
        finally:
            self.shipper.close()
            self.outbox.close()
            self._lock.release()

    def _put(self, op: str, **fields: Any) -> None:
        self.outbox.put(op, **fields)
        self.shipper.wake()

    def _below(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _lost(self) -> None:
        self.taken = True


@contextmanager
def session(
    config: Config,
    *,
    stage: str,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    report: Callable[[str], None] = to_stderr,
) -> Iterator[RunSession]:
    """Open a run for the length of a block.

    Args:
        config: recorded as parameters, as config.json and by its digest.
        stage: seed, train, evaluate, bench, promote or main; a tag.
        run_id: go on with this run; None: the run that `mlflow run` made for this process,
            else a new one, the child of a session that is open around it.
        tags: more tags.
        report: receives one-line messages.

    Raises:
        TrackingError: if the store cannot be used, there is no such run, or another process has
            it. A server that is merely away is no error.
    """
    # MLflow's own retries would only hide an outage from the outbox.
    unset = {name: value for name, value in _PATIENT.items() if name not in os.environ}
    with store.environment(unset):
        yield from _session(config, stage, run_id, tags, report)


def _session(
    config: Config,
    stage: str,
    run_id: str | None,
    tags: Mapping[str, str] | None,
    report: Callable[[str], None],
) -> Iterator[RunSession]:
    client, away = store.reach(config.tracking)
    _check_state_root()
    launched = None
    if not _open and not config.tracking.offline and mlflow.active_run() is None:
        launched = os.environ.pop("MLFLOW_RUN_ID", None)
    launcher = launched if run_id not in (None, launched) else None
    run_id = run_id or launched
    own = {
        "tunix_mlflow.stage": stage,
        "tunix_mlflow.version": __version__,
        "tunix_mlflow.config_digest": config_digest(config),
        "tunix_mlflow.python": platform.python_version(),
        **(tags or {}),
    }
    if config.tracking.key:
        own["tunix_mlflow.key"] = config.tracking.key
    try:
        run = _begin(client, away, config, run_id, own, stage, report)
    except BaseException:
        if launched is not None:
            os.environ["MLFLOW_RUN_ID"] = launched  # so that the error finds it
        raise
    if launcher is not None:
        run._put("launcher", run_id=launcher)
    status, message = "FAILED", ""
    context.enter(own)
    _open.append(run)
    monitor = None
    try:
        if config.tracking.system_metrics:
            monitor = SystemMetrics(run.journal)
        _describe(run, config, own)
        yield run
        status = "FINISHED"
        run._put("untag", name="tunix_mlflow.error")  # of a part that was interrupted
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        status, message = "KILLED", f"interrupted by {signal.Signals(number).name}"
        raise
    except BaseException as error:
        message = store.one_line(error)
        raise
    finally:
        with _undisturbed(run):
            context.leave()
            _open.remove(run)
            if monitor is not None:
                monitor.finish()
            try:
                if message and not run.taken:
                    run.set_tags({"tunix_mlflow.error": message})
                told = run.end(status, launcher=launcher)
            except OSError as error:  # a full disk; what ended the block is the news
                told = True
                report(f"the end of run {run.run_id} could not be recorded: {error}")
            finally:
                _leave_fluent(run.run_id, None if run.taken else status)
            if not told:
                report(
                    f"MLflow does not have all of run {run.run_id} yet; nothing is lost. When the"
                    f" server is back: tunix-mlflow sync {run.run_id}"
                )


def _begin(
    client: MlflowClient,
    away: str | None,
    config: Config,
    run_id: str | None,
    tags: dict[str, str],
    stage: str,
    report: Callable[[str], None],
) -> RunSession:
    """Make or attach the run, here if MLflow is away, and open its folder."""
    name = config.tracking.run_name or _run_name(config, stage)
    if away is None:
        try:
            return _begin_there(client, config, run_id, name, tags, stage, report)
        except MlflowException as error:
            away = store.went_away(error)
            if away is None:
                raise TrackingError(f"cannot start the run: {store.one_line(error)}") from error
    folder = paths.run_dir(run_id or uuid.uuid4().hex)
    if run_id is not None and not (folder / "config.json").exists():
        raise TrackingError(f"{away}, and run {run_id} is not on this machine")
    lock = _locked(folder)
    run = RunSession(client, folder, lock, report, config.tracking.lease_seconds)
    report(f"{away}: recording in {folder}; MLflow is told when it is back")
    run.shipper.said = True
    if run_id is None:
        run._put(
            "create",
            name=name,
            experiment=config.tracking.experiment,
            tags=tags,
            parent=_open[-1].folder.name if _open else None,
            start_time=delivery.now(),
        )
    return run


def _begin_there(
    client: MlflowClient,
    config: Config,
    run_id: str | None,
    name: str,
    tags: dict[str, str],
    stage: str,
    report: Callable[[str], None],
) -> RunSession:
    seconds = config.tracking.lease_seconds
    with contextlib.ExitStack() as undo:
        if run_id is None:
            active = _start(client, config, name, tags | lease.provisional(seconds))
            undo.callback(_leave_fluent, active.info.run_id, "FAILED")
            folder = paths.run_dir(active.info.run_id)
            lock = _locked(folder)
            undo.callback(lock.release)
            held = lease.acquire(client, active.info.run_id, folder, seconds, report, fresh=True)
        else:
            before = client.get_run(run_id).data.tags
            _check_same(before, tags, run_id)
            folder = paths.run_dir(run_id).resolve()
            lock = _locked(folder)
            undo.callback(lock.release)
            own_last = (lease.holder(before) or ("", 0))[0] == lease.owner_of(folder)
            refill = folder / "refill"  # stays when this process dies before it is done
            if "tunix_mlflow.stage" in before and not (
                own_last and (folder / METRICS_LOG).exists()
            ):
                refill.touch()
            held = lease.acquire(client, run_id, folder, seconds, report)
            if refill.exists():
                lookup.refill(client, run_id, folder, report)
                refill.unlink()
            active = mlflow.start_run(run_id=run_id, nested=True)
            undo.callback(_leave_fluent, active.info.run_id, "FAILED")
        delivery.adopt(folder, active.info.run_id, active.info.experiment_id)
        if stage == "train":
            try:
                stale = lookup.mark_stale(client, active.info.experiment_id)
            except MlflowException as error:
                stale = []
                report(
                    f"runs that died without a word were not looked for: {store.one_line(error)}"
                )
            for dead in stale:
                report(f"run {dead} was left RUNNING by a process that died; it is KILLED now")
        run = RunSession(client, folder, lock, report, seconds)
        run.shipper.lease = held
        undo.pop_all()
    return run


def _start(
    client: MlflowClient, config: Config, name: str, tags: dict[str, str]
) -> mlflow.ActiveRun:
    outer = mlflow.active_run()
    experiment = (
        outer.info.experiment_id
        if outer is not None
        else store.experiment_id(client, config.tracking.experiment)
    )
    context.enter(tags)
    # A launcher's run is on a server and cannot go on in the offline store. MLflow would
    # take it up; afterwards the variable is back, so that an error still finds the run.
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        return mlflow.start_run(experiment_id=experiment, run_name=name, nested=outer is not None)
    finally:
        context.leave()
        if launched is not None:
            os.environ["MLFLOW_RUN_ID"] = launched


def _leave_fluent(run_id: str, status: str | None) -> None:
    """End MLflow's own notion of the active run; its status is recorded already.

    Else MLflow would end it when the process exits, as FINISHED.

    Args:
        run_id: MLflow's.
        status: None: leave the run's own as it is.
    """
    active = mlflow.active_run()
    if active is None or active.info.run_id != run_id:
        return
    if status is None:
        mlflow.tracking.fluent._active_run_stack.get().pop()
        return
    try:
        with store.environment(_IMPATIENT):
            mlflow.end_run(status)
    except Exception as error:  # the server is away; the outbox has it
        del error


_PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}


def _check_state_root() -> None:
    try:
        paths.root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(
            f"cannot use the state root {paths.root()}: {error.strerror};"
            f" set {paths.HOME_VARIABLE} to another folder"
        ) from error


def _locked(folder: Path) -> FileLock:
    """The lock of a run's folder; the system drops it with the process, however it dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrackingError(
            f"run {folder.name} is open in another process on this machine; wait for it or end it"
        ) from error
    except OSError as error:
        raise TrackingError(f"cannot write to {folder}: {error.strerror}") from error
    return lock


@contextmanager
def _undisturbed(run: RunSession) -> Iterator[None]:
    """No signal keeps a run from getting its status; one after 2 s ends the wait for MLflow."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    begun = time.monotonic()

    def insist(*_: object) -> None:
        if time.monotonic() - begun > _INSIST_SECONDS:
            run.shipper.give_up()

    before = [signal.signal(number, insist) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _check_same(stored: Mapping[str, str], now: Mapping[str, str], run_id: str) -> None:
    for name, value in now.items():
        if not name.endswith("_digest") or name == "tunix_mlflow.config_digest":
            continue
        if stored.get(name, value) != value:
            raise TrackingError(
                f"run {run_id} was made with another {name.removeprefix('tunix_mlflow.')}"
                f" ({stored[name][:16]}, now {value[:16]}); start a new run"
            )


def _describe(run: RunSession, config: Config, tags: Mapping[str, str]) -> None:
    event_log.write_whole(run.folder / "config.json", to_json(config))
    environment = {name: os.environ.get(name, "") for name in ("NPROC", "XLA_FLAGS")}
    event_log.write_whole(run.folder / "environment.json", msgspec.json.encode(environment))
    run._put("running")
    run.set_tags(tags)
    run.log_params(flatten(config))
    run.log_file(run.folder / "config.json")
    run.log_file(run.folder / "environment.json")
    run._put("experiment_kind")


def _run_name(config: Config, stage: str) -> str:
    return f"{stage} {config.dataset}" if config.dataset else stage
