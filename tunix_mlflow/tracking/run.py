"""A run: everything that a loop, ours or another, records in MLflow.

    with tunix_mlflow.start_run(experiment="mine", key="job-17", resume=True) as run:
        run.log_params({"rate": 0.1})
        for step in ...:
            run.log_metrics({"loss": loss}, step=step)

Everything goes to the run's folder first, and from there to MLflow in the background: no step waits
for a server, and a server that is away costs nothing but a later `tunix-mlflow sync`. While the run
is open it is MLflow's active run in its thread. Whichever way the block ends, the run gets its
status: FINISHED, FAILED with the message in the tag `tunix_mlflow.error`, or KILLED.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import RunInfo
from mlflow.tracking import MlflowClient

from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import TrackingError
from tunix_mlflow.tracking import active, ending, opening, store
from tunix_mlflow.tracking import tags as names
from tunix_mlflow.tracking.opening import Opened, Request
from tunix_mlflow.tracking.record import folder as folders
from tunix_mlflow.tracking.record import records
from tunix_mlflow.tracking.record.cursor import read_cursor, skip_pending
from tunix_mlflow.tracking.record.folder import METRICS_LOG, read_link
from tunix_mlflow.tracking.record.metrics_log import now
from tunix_mlflow.tracking.record.records import Record
from tunix_mlflow.tracking.record.system_metrics import SystemMetrics
from tunix_mlflow.tracking.recording import Recording
from tunix_mlflow.tracking.sync.upload import describe_refused
from tunix_mlflow.tracking.sync.worker import SyncWorker
from tunix_mlflow.version import __version__

if TYPE_CHECKING:
    pass

_STATUSES = ("FINISHED", "FAILED", "KILLED")


class Run(Recording):
    """One open run. Made by `start_run` or `open_run`; its methods have MLflow's names.

    Args:
        client: reaches MLflow.
        opened: the run and its folder.
        report: receives one-line messages.
        lease_seconds: for how long the run stays this process's after its last sign of life.
        stage: of a pipeline of ours; None: a user's run, which records what they log and no more.
        own_tags: set on the run.
        launcher: a run that `mlflow run` made only to start this one.
        log_system_metrics: whether to sample CPU, memory and GPU use as system/*.
        must_be_complete: whether a command fails if MLflow refuses a part of the run.
    """

    def __init__(
        self,
        client: MlflowClient,
        opened: Opened,
        report: Callable[[str], None],
        *,
        lease_seconds: float,
        stage: str | None,
        own_tags: Mapping[str, str],
        launcher: str | None,
        log_system_metrics: bool,
        must_be_complete: bool,
    ) -> None:
        super().__init__(opened.folder, report, name_conflicts=stage is None)
        self._must_be_complete = must_be_complete
        self._is_complete = self._has_its_end = False  # MLflow knows the end, if not all else
        self.client, self.stage = client, stage
        self._attached, self._launcher = opened.attached, launcher
        self._info, self._lock, self._marker = opened.info, opened.lock, opened.marker
        # Before the worker, which would keep the lease of a run that never began.
        self._monitor = SystemMetrics(self._metrics) if log_system_metrics else None
        lease, away = opened.lease, opened.lease is None
        self._worker = SyncWorker(
            self.folder, client, report, lease_seconds, self._lose, lease, is_away=away
        )
        if opened.attached:
            self._put(records.Begin())
        if launcher is not None:
            self._put(records.Launcher(run_id=launcher))
        self._put(records.Tags(tags=dict(own_tags)))
        if stage is not None:
            self._put(records.ExperimentKind())
        self._activation = active.Activation(lambda: self.info)
        ending.register(self)

    @property
    def info(self) -> RunInfo:
        """MLflow's info of the run, as it was when the run began."""
        link = read_link(self.folder) if self._info.run_id == self.folder.name else None
        if link is not None and link.run_id != self._info.run_id:
            first = self._info
            self._info = RunInfo(
                run_id=link.run_id,
                experiment_id=link.experiment_id,
                user_id=first.user_id,
                status=first.status,
                start_time=first.start_time,
                end_time=None,
                lifecycle_stage=first.lifecycle_stage,
                run_name=first.run_name,
            )
        return self._info

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; while MLflow does not have it, the folder's name."""
        return str(self.info.run_id)

    @property
    def experiment_id(self) -> str | None:
        """The run's experiment; None while MLflow does not have the run."""
        link = read_link(self.folder)
        return link.experiment_id if link else None

    @property
    def model_id(self) -> str | None:
        """The model that was logged last; None while MLflow does not have it."""
        link = read_link(self.folder)
        delivered = read_cursor(self.folder).models >= self._model_recorded
        return link.model_id if link and delivered else None

    @property
    def link(self) -> str:
        """The run's page in the UI; its folder while there is none."""
        link = read_link(self.folder)
        if link is None:
            return str(self.folder)
        return store.run_link(link.experiment_id, link.run_id)

    @property
    def is_online(self) -> bool:
        """Whether MLflow has the run, and this process its lease."""
        return self._worker.lease is not None

    def sync(self) -> bool:
        """Wait until MLflow has what was recorded so far, as long as it answers.

        Returns:
            Whether it has.
        """
        return self._worker.drain()

    def end(self, status: str = "FINISHED", error: str | None = None) -> bool:
        """End the run: record its status, wait for MLflow, close the files.

        A second call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            error: the message for the tag `tunix_mlflow.error`.

        Returns:
            Whether MLflow has everything.

        Raises:
            TrackingError: for another status.
        """
        if status not in _STATUSES:
            raise TrackingError(f"a run ends {', '.join(_STATUSES)}, not {status!r}")
        if self._ended or self._is_forked:
            return self._is_complete
        self._ended = True
        with ending.undisturbed(self._worker.give_up, interrupted=status == "KILLED"):
            try:
                self._is_complete = self._end(status, error)
                return self._is_complete
            finally:
                with contextlib.ExitStack() as last:  # each of them, whatever another raises
                    last.callback(active.restore_request_limits)
                    last.callback(self._lock.release)
                    last.callback(self._marker.release, remove=self._has_its_end)
                    last.callback(self._events.close)
                    last.callback(self._worker.close)
                    last.callback(ending.unregister, self)
                    last.callback(self._activation.end)

    def leave(self) -> None:
        """Let go of the run in a forked process: it stays the parent's, with its locks.

        A lock that this process unlocked, or kept, would be the parent's too.
        """
        self._is_forked = True
        self._activation.leave()
        self._marker.release(remove=False)
        folders.leave(self._lock)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.end(*ending.outcome(error))

    def _end(self, status: str, error: str | None) -> bool:
        try:
            if self._monitor is not None:
                self._monitor.finish()
            self._metrics.close()
            if self._lost:
                skip_pending(self.folder)  # another process records the run
                self._has_its_end = True
                return True
            if error is not None:
                self._put(records.Tags(tags={names.ERROR: error}))
            elif self._attached:
                self._put(records.DeleteTag(name=names.ERROR))  # of a part that was interrupted
            if self.stage is not None:
                self._put(records.Artifact(path=METRICS_LOG, artifact=METRICS_LOG))
            for run_id in (None, self._launcher) if self._launcher else (None,):
                self._put(records.Status(status=status, end_time=now(), run_id=run_id))
            delivered = self._has_its_end = self._worker.drain()
            self._worker.give_up()  # and say no more
            if delivered and self._worker.lease is not None:
                with contextlib.suppress(Exception):  # it ends by itself
                    self._worker.lease.release()
        except OSError as problem:  # a full disk; what ended the block is what the user must see
            self.report(f"the end of run {self.run_id} could not be recorded: {problem}")
            return False
        refused = describe_refused(self.folder)
        if not delivered:
            why = f": {self._worker.problem}" if self._worker.problem else ""
            self.report(
                f"MLflow does not have all of run {self.run_id} yet{why}; nothing is lost. Later:"
                f" tunix-mlflow sync {self.run_id}"
            )
        elif refused is not None:
            self.report(
                f"MLflow refuses a part of run {self.run_id}: {refused}. It is kept in"
                f" {self.folder}; when the cause is gone: tunix-mlflow sync {self.run_id}"
            )
            if self._must_be_complete:
                ending.incomplete.append(self.run_id)
        return delivered and refused is None

    def _put(self, record: Record) -> None:
        super()._put(record)
        self._worker.wake()

    def _lose(self) -> None:
        self._lost = True


def start_run(
    *,
    experiment: str | None = None,
    experiment_id: str | None = None,
    run_id: str | None = None,
    run_name: str | None = None,
    key: str | None = None,
    resume: bool = False,
    nested: bool | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str | None = None,
    log_system_metrics: bool = True,
) -> Run:
    """Begin a run, at once; use it in a `with` block, or call its `end`.

    While it is open it is MLflow's active run in this thread, so that `mlflow.log_figure` and
    autologging land there. It records what is logged, and nothing else (besides system/*).

    A run that is continued keeps its experiment, name and parent, as MLflow's own do.

    Args:
        experiment: name of the experiment; None: MLflow's own choice (`mlflow.set_experiment`,
            MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID, or the parent's), else tunix-mlflow.
        experiment_id: its id instead.
        run_id: continue this run. None: the run that `mlflow run` made for this process, if this
            is its first, else a new one.
        run_name: shown in the UI.
        key: a name of yours by which the run is found again, on any machine.
        resume: continue the newest unfinished run with `key`; without one, start it.
        nested: None: the child of the run that is active in this thread, if any. False: that is an
            error, as in MLflow.
        parent_run_id: the parent, if it is not the active run.
        tags: set on the run.
        description: the note on the run's page.
        log_system_metrics: whether to sample CPU, memory and GPU use as system/*.

    Returns:
        The run; its messages go to the logger `tunix_mlflow`.

    Raises:
        UnavailableError: if another process has the run open, or it is neither here nor reachable.
            A server that is merely away is no error.
        TrackingError: if the store cannot be used, or there is no such run.
    """
    if resume and key is None and run_id is None:
        raise TrackingError("resume=True needs the key, or the run_id, of the run to continue")
    if experiment is not None and experiment_id is not None:
        raise TrackingError("give experiment or experiment_id, not both")
    given = {str(name): str(value) for name, value in (tags or {}).items()}
    if description is not None:
        if names.NOTE in given:
            raise TrackingError(f"give description or the tag {names.NOTE}, not both")
        given[names.NOTE] = description
    return _start(
        TrackingConfig(key=key),
        stage=None,
        run_id=run_id,
        name=run_name,
        resume=resume,
        experiment=experiment,
        experiment_id=experiment_id,
        nested=nested,
        parent_run_id=parent_run_id,
        tags=given,
        take_over=None,
        report=logging.getLogger("tunix_mlflow").warning,
        log_system_metrics=log_system_metrics,
    )


def open_run(
    *,
    stage: str,
    tracking: TrackingConfig,
    run_id: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    take_over: str | None = None,
    report: Callable[[str], None],
) -> Run:
    """Begin the run of a pipeline's stage; see :func:`start_run`.

    Args:
        stage: seed, train, evaluate, bench, promote, import or main; a tag.
        tracking: where to record.
        run_id: continue this run; its tags that end in _digest must be the same.
        name: shown in the UI; `tracking.run_name` wins.
        tags: set on the run.
        take_over: why another process's lease on it is not waited for; None: it is.
        report: receives one-line messages.

    Raises:
        UnavailableError: if another process has the run open, or it is neither here nor reachable.
        TrackingError: if the store cannot be used, there is no such run, or it has other digests.
    """
    return _start(
        tracking,
        stage=stage,
        run_id=run_id,
        name=tracking.run_name or name or stage,
        resume=False,
        experiment=tracking.experiment,
        experiment_id=None,
        nested=None,
        parent_run_id=None,
        tags={names.STAGE: stage} | dict(tags or {}),
        take_over=take_over,
        report=report,
        log_system_metrics=tracking.system_metrics,
    )


def _start(
    tracking: TrackingConfig,
    *,
    stage: str | None,
    run_id: str | None,
    name: str | None,
    resume: bool,
    experiment: str | None,
    experiment_id: str | None,
    nested: bool | None,
    parent_run_id: str | None,
    tags: Mapping[str, str],
    take_over: str | None,
    report: Callable[[str], None],
    log_system_metrics: bool,
) -> Run:
    outer = mlflow.active_run()
    if outer is not None and nested is False:
        raise TrackingError(
            f"run {outer.info.run_id} is active already; end it first, or leave out nested=False"
        )
    own = {names.VERSION: __version__} | dict(tags)
    if tracking.key is not None:
        own[names.KEY] = tracking.key
    if outer is not None and experiment_id is None and (stage is not None or experiment is None):
        experiment_id = outer.info.experiment_id or None
    wanted = store.wanted_experiment(experiment, experiment_id)
    launched = None
    active.set_request_limits()
    try:
        client, away = store.reach(tracking)
        if outer is None and not tracking.offline:
            launched = opening.take_launched()
        parent = parent_run_id or (outer.info.run_id if outer is not None else None)
        request = Request(
            run_id=run_id,
            launched=launched,
            name=name,
            key=tracking.key,
            resume=resume,
            experiment=wanted[0],
            experiment_id=wanted[1],
            parent=parent,
            tags=own,
            lease_seconds=tracking.lease_seconds,
            mark_stale=outer is None,
            take_over=take_over,
        )
        opened = opening.open_folder(client, away, request, report)
        try:
            return Run(
                client,
                opened,
                report,
                lease_seconds=tracking.lease_seconds,
                stage=stage,
                own_tags=opening.commit_tags() | own,
                launcher=launched if launched != opened.info.run_id else None,
                log_system_metrics=log_system_metrics,
                must_be_complete=tracking.incomplete == "fail",
            )
        except BaseException:
            opened.marker.release(remove=False)
            opened.lock.release()
            raise
    except BaseException:
        active.restore_request_limits()
        if launched is not None:
            os.environ["MLFLOW_RUN_ID"] = launched  # so that whoever reports the error finds it
        raise
