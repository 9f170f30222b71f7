"""A run session: everything that a training loop, ours or another, records in MLflow.

    with session(config, stage="train") as run:
        run.log_dataset(manifest, "train", usage="training")
        for step in ...:
            run.write_scalars(step, {"train/loss": loss})

Whichever way the block ends, the run gets its status: FINISHED, FAILED with the message in
the tag `tunix.error`, or KILLED by a signal.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from tunix_mlflow import __version__, state
from tunix_mlflow import config as configs
from tunix_mlflow.config import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import Interrupted, NotShipped, TrackingError
from tunix_mlflow.tracking import context, store
from tunix_mlflow.tracking.dataset import TunixDataset
from tunix_mlflow.tracking.journal import Journal, Point, read, summary

_PARAM_LIMIT = 6000
_TAG_LIMIT = 5000


def to_stderr(message: str) -> None:
    """Where a session's messages go unless told otherwise."""
    print(f"tunix-mlflow: {message}", file=sys.stderr, flush=True)


class RunSession:
    """One open MLflow run. Made by :func:`session`; a MetricWriter."""

    def __init__(
        self, client: MlflowClient, run_id: str, experiment: str, report: Callable[[str], None]
    ) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment
        self.report = report
        self.folder = state.run_dir(run_id)
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[tuple[Path, str, Future[bool]]] = []
        self._journal: Journal | None = None

    @property
    def link(self) -> str:
        """The run's page in the UI."""
        return store.run_link(self.experiment_id, self.run_id)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record metrics of one step; returns after one write to a local file."""
        if self._journal is None:
            self._journal = Journal(self.folder / "metrics.jsonl", self._ship, self.report)
        self._journal.write_scalars(step, scalars)

    def flush(self) -> None:
        """Make the local record durable."""
        if self._journal is not None:
            self._journal.flush()

    def sync(self) -> None:
        """Wait until MLflow has the metrics written so far, as long as it takes them."""
        if self._journal is not None:
            self._journal.drain()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; one that the run has already keeps its spelling."""
        have = self.client.get_run(self.run_id).data.params
        new = [Param(k, str(v)[:_PARAM_LIMIT]) for k, v in params.items() if k not in have]
        for start in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[start : start + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; later values win."""
        self.client.log_batch(
            self.run_id, tags=[RunTag(k, str(v)[:_TAG_LIMIT]) for k, v in tags.items()]
        )

    def log_dataset(self, manifest: Manifest, split: str, *, usage: str) -> tuple[str, str]:
        """Record one split as an input of the run.

        Args:
            manifest: the dataset.
            split: its split.
            usage: MLflow's context of the input, for example training.

        Returns:
            Name and digest by which MLflow knows it.
        """
        entity = TunixDataset(manifest, split)._to_mlflow_entity()
        tags = [InputTag("mlflow.data.context", usage)]
        self.client.log_inputs(self.run_id, [DatasetInput(entity, tags)])
        return entity.name, entity.digest

    def log_model_input(self, model_id: str) -> None:
        """Record that the run used a logged model."""
        self.client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])

    def log_text(self, text: str, artifact: str) -> None:
        """Store a text as an artifact."""
        self.client.log_text(self.run_id, text, artifact)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_folder(self, path: Path, artifact: str) -> None:
        """Store a folder's content as an artifact folder, in the background.

        A server that does not take it does not stop the run: it is said, and tried again when
        the session ends.
        """
        self._uploads.append((path, artifact, self._uploader.submit(self._upload, path, artifact)))

    def log_table(self, columns: Mapping[str, Sequence[Any]], artifact: str) -> None:
        """Store a table that the UI shows as one; it replaces one of the same name.

        Args:
            columns: name -> values, all of equal length.
            artifact: path that ends in .json.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        table = {"columns": list(columns), "data": rows}
        self.client.log_text(self.run_id, json.dumps(table, ensure_ascii=False), artifact)
        # The UI finds tables by this tag, which MLflow's own log_table sets too.
        tag = "mlflow.loggedArtifacts"
        shown = json.loads(self.client.get_run(self.run_id).data.tags.get(tag, "[]"))
        entry = {"path": artifact, "type": "table"}
        if entry not in shown:
            self.client.set_tag(self.run_id, tag, json.dumps([*shown, entry]))

    def log_note(self, markdown: str) -> None:
        """Write the description on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_summary(self, step: int) -> dict[str, float]:
        """Record the six summary figures, as far as the run has come.

        Returns:
            The figures, empty if the run has no training loss.
        """
        figures = summary(read(self.folder / "metrics.jsonl"))
        if figures:
            self.write_scalars(step, figures)
        return figures

    def last(self, key: str) -> dict[str, float]:
        """The latest value of a metric as {key: value}; empty if it was never written."""
        found: dict[str, float] = {}
        for line in read(self.folder / "metrics.jsonl"):
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
        name, digest = dataset or (None, None)
        now = mlflow.utils.time.get_current_time_millis()
        self.client.log_batch(
            self.run_id,
            metrics=[
                Metric(
                    key,
                    value,
                    now,
                    0,
                    model_id=model_id,
                    dataset_name=name,
                    dataset_digest=digest,
                    run_id=self.run_id,
                )
                for key, value in figures.items()
            ],
        )

    def close(self, *, quietly: bool = False) -> None:
        """Ship what is left.

        Args:
            quietly: report what cannot be shipped, in place of raising.

        Raises:
            NotShipped: if it cannot be shipped.
        """
        try:
            if self._journal is not None:
                self._journal.close()
            self._uploader.shutdown(wait=True)
            for path, artifact, upload in self._uploads:
                if upload.result() or not path.exists():
                    continue  # it is there, or a newer checkpoint took its place
                if not self._upload(path, artifact):
                    raise NotShipped(f"{artifact} was not uploaded; it is in {path}")
        except NotShipped as error:
            if not quietly:
                raise
            self.report(str(error))

    def _upload(self, path: Path, artifact: str) -> bool:
        try:
            self.client.log_artifacts(self.run_id, str(path), artifact)
        except Exception as error:  # whatever the client raises, the folder is still there
            if path.exists():
                self.report(f"{artifact} was not uploaded: {store.one_line(error)}")
            return False
        return True

    def _ship(self, points: Sequence[Point]) -> None:
        metrics = [Metric(p.key, p.value, p.timestamp, p.step) for p in points]
        self.client.log_batch(self.run_id, metrics=metrics)


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
        TrackingError: if MLflow cannot be reached, or there is no such run.
    """
    client = store.connect(config.tracking)
    _check_state_root()
    launched = None
    if run_id is None and mlflow.active_run() is None and not config.tracking.offline:
        run_id = launched = os.environ.pop("MLFLOW_RUN_ID", None)
    own = {
        "tunix.stage": stage,
        "tunix.version": __version__,
        "tunix.config_digest": configs.digest(config),
        "tunix.python": platform.python_version(),
        **(tags or {}),
    }
    lock = None
    try:
        lock = _lock(run_id) if run_id else None
        active = _start(client, config, run_id, own, stage)
    except BaseException:
        if lock is not None:
            lock.release()
        if launched is not None:
            os.environ["MLFLOW_RUN_ID"] = launched  # so that the error finds it
        raise
    run = RunSession(client, active.info.run_id, active.info.experiment_id, report)
    monitor: SystemMetricsMonitor | None = None
    status = "FAILED"
    context.enter(own)
    try:
        if lock is None:
            lock = _lock(run.run_id)
        _describe(run, config, own)
        if config.tracking.system_metrics:
            monitor = SystemMetricsMonitor(
                run.run_id, sampling_interval=5, resume_logging=run_id is not None
            )
            monitor.start()
        try:
            yield run
        except BaseException:
            run.close(quietly=True)  # what ended the block is the news
            raise
        run.close()
        if "tunix.error" in client.get_run(run.run_id).data.tags:
            client.delete_tag(run.run_id, "tunix.error")  # of a part that was interrupted
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt) as error:
        status = "KILLED"
        number = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        _tag_error(run, f"interrupted by {signal.Signals(number).name}")
        raise
    except BaseException as error:
        _tag_error(run, store.one_line(error))
        raise
    finally:
        with _undisturbed():
            context.leave()
            _end(run, status)
            if monitor is not None:
                monitor.finish()
            if lock is not None:
                lock.release()


def _start(
    client: MlflowClient, config: Config, run_id: str | None, tags: dict[str, str], stage: str
) -> mlflow.ActiveRun:
    try:
        if run_id is not None:
            _check_same(client.get_run(run_id).data.tags, tags, run_id)
            return mlflow.start_run(run_id=run_id, nested=True)
        outer = mlflow.active_run()
        experiment = (
            outer.info.experiment_id
            if outer is not None
            else store.experiment_id(client, config.tracking)
        )
        context.enter(tags)
        # A launcher's run is on a server and cannot go on in the offline store. MLflow would
        # take it up; afterwards the variable is back, so that an error still finds the run.
        launched = os.environ.pop("MLFLOW_RUN_ID", None)
        try:
            name = config.tracking.run_name or _run_name(config, stage)
            return mlflow.start_run(
                experiment_id=experiment, run_name=name, nested=outer is not None
            )
        finally:
            context.leave()
            if launched is not None:
                os.environ["MLFLOW_RUN_ID"] = launched
    except MlflowException as error:
        raise TrackingError(f"cannot start the run: {store.one_line(error)}") from error


def _check_state_root() -> None:
    try:
        state.root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(
            f"cannot use the state root {state.root()}: {error.strerror};"
            f" set {state.HOME_VARIABLE} to another folder"
        ) from error


def _lock(run_id: str) -> FileLock:
    """The lock of a run's folder; the system drops it with the process, however it dies."""
    folder = state.run_dir(run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrackingError(
            f"run {run_id} is open in another process on this machine; wait for it or end it"
        ) from error
    except OSError as error:
        raise TrackingError(f"cannot write to {folder}: {error.strerror}") from error
    return lock


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No second signal keeps a run from getting its status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _check_same(stored: Mapping[str, str], now: Mapping[str, str], run_id: str) -> None:
    for name, value in now.items():
        if name.endswith("_digest") and stored.get(name, value) != value:
            raise TrackingError(
                f"run {run_id} was made with another {name.removeprefix('tunix.')}"
                f" ({stored[name][:16]}, now {value[:16]}); start a new run"
            )


def _describe(run: RunSession, config: Config, tags: Mapping[str, str]) -> None:
    (run.folder / "config.json").write_bytes(configs.to_json(config))
    (run.folder / "environment.json").write_text(
        json.dumps({name: os.environ.get(name, "") for name in ("NPROC", "XLA_FLAGS")})
    )
    store.mark_experiment(run.client, run.experiment_id)
    run.set_tags(tags)
    run.log_params(configs.flatten(config))
    run.log_file(run.folder / "config.json")
    run.log_file(run.folder / "environment.json")


def _tag_error(run: RunSession, message: str) -> None:
    try:
        run.set_tags({"tunix.error": message})
    except Exception as error:  # the first error matters more than a dead server
        run.report(f"the run's error could not be recorded: {store.one_line(error)}")


def _end(run: RunSession, status: str) -> None:
    try:
        mlflow.end_run(status)
    except Exception as error:  # as above; the status stays RUNNING on a dead server
        run.report(f"the run's status could not be recorded: {store.one_line(error)}")


def _run_name(config: Config, stage: str) -> str:
    return f"{stage} {config.dataset}" if config.dataset else stage
