"""What a run records, with MLflow's names; everything goes to the run's folder."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from mlflow.entities import Dataset as DatasetEntity

from tunix_mlflow import files
from tunix_mlflow.errors import TrackingError, UnavailableError
from tunix_mlflow.tracking import tags
from tunix_mlflow.tracking.record import metrics_log, records
from tunix_mlflow.tracking.record.cursor import size
from tunix_mlflow.tracking.record.event_log import EventLog
from tunix_mlflow.tracking.record.folder import EVENT_LOG, METRICS_LOG
from tunix_mlflow.tracking.record.metrics_log import MetricsLog, now
from tunix_mlflow.tracking.record.records import Record
from tunix_mlflow.tracking.record.values import split_values, to_step, to_text, to_timestamp
from tunix_mlflow.tracking.recorder import Recorder, encode_table

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.data.dataset import Dataset

_FORBIDDEN_IN_MODEL_NAMES = "/:.%\"'"


class Recording:
    """The local record of one run.

    Args:
        folder: the run's.
        report: receives one-line messages.
        name_conflicts: whether to report params that the run has with another value.
    """

    def __init__(
        self, folder: Path, report: Callable[[str], None], *, name_conflicts: bool
    ) -> None:
        self.folder, self.report, self._name_conflicts = folder, report, name_conflicts
        self._ended = self._lost = self._is_forked = False
        self._named: set[str] = set()  # keys whose values were reported
        self._recorder: Recorder | None = None
        self._metrics = MetricsLog(folder / METRICS_LOG, report)
        self._events = EventLog(folder)
        # Bytes of the event log with the model logged last, or with what an earlier process left.
        self._model_recorded = size(folder / EVENT_LOG)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; while MLflow does not have it, the folder's name."""
        raise NotImplementedError

    def log_metric(
        self,
        key: str,
        value: Any,
        step: SupportsIndex | None = None,
        timestamp: int | None = None,
        model_id: str | None = None,
        dataset: Dataset | DatasetEntity | None = None,
    ) -> None:
        """Record one metric; see :meth:`log_metrics`."""
        self.log_metrics(
            {key: value}, step, timestamp=timestamp, model_id=model_id, dataset=dataset
        )

    def log_metrics(
        self,
        metrics: Mapping[str, Any],
        step: SupportsIndex | None = None,
        *,
        timestamp: int | None = None,
        model_id: str | None = None,
        dataset: Dataset | DatasetEntity | None = None,
    ) -> None:
        """Record metrics of one step; returns after one write to a local file.

        A value that is no finite number is reported, once for its key, and the others are kept.
        Within a process each call is one more point, as in MLflow. In a resumed run a point that
        was recorded before with the same step and value is not recorded again; with another value,
        keys of `train/`, `validation/`, `eval/`, `train_perf/`, `perf/` and `system/` keep their
        first one.

        Args:
            metrics: key -> value; NumPy and JAX scalars are taken.
            step: an integer, NumPy's and JAX's too; None is 0, as in MLflow.
            timestamp: milliseconds since 1970; None: now.
            model_id: a logged model that the values belong to.
            dataset: what they were measured on.

        Raises:
            UnavailableError: when another process has taken the run's lease.
            TrackingError: for a step or a timestamp that is no integer of 64 bits, or when the run
                has ended.
        """
        self._check_open()
        good, bad = split_values(metrics)
        self._report_once(bad)
        if good:
            measured_on = None
            if dataset is not None:
                entity = dataset_entity(dataset)
                measured_on = (entity.name, entity.digest)
            at = to_timestamp(timestamp)
            self._metrics.log_metrics(good, to_step(step), at, model_id, measured_on)

    def log_param(self, key: str, value: Any) -> Any:
        """Record one parameter as `str(value)`; return the value."""
        self.log_params({key: value})
        return value

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters as `str(value)`; one that the run has already keeps its value."""
        given = {to_text(key): to_text(value) for key, value in params.items()}
        self._record(records.Params(params=given, name_conflicts=self._name_conflicts))

    def set_tag(self, key: str, value: Any) -> None:
        """Record one tag."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record tags as `str(value)`; later values win."""
        given = {to_text(key): to_text(value) for key, value in tags.items()}
        self._record(records.Tags(tags=given))

    def set_note(self, markdown: str) -> None:
        """Write the description on the run's page."""
        self.set_tags({tags.NOTE: markdown})

    def log_input(
        self,
        dataset: Dataset | DatasetEntity,
        context: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record a dataset as an input of the run.

        Args:
            dataset: any of `mlflow.data`.
            context: how it is used, for example training.
            tags: of the input.
        """
        given = {"mlflow.data.context": context} if context is not None else {}
        given |= {str(key): str(value) for key, value in (tags or {}).items()}
        self._record(records.Input(dataset=dict(dataset_entity(dataset)), tags=given))

    def log_model_input(self, model_id: str) -> None:
        """Record that the run used a logged model."""
        self._record(records.ModelInput(model_id=model_id))

    def log_model(
        self,
        bundle: Path,
        *,
        name: str,
        step: int,
        prompts: Sequence[str],
        tags: Mapping[str, str],
        metrics: Mapping[str, float] | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        """Log the run's model.

        Args:
            bundle: a folder below the run's, written by `models.bundle.save`.
            name: the logged model's, without / : . % " and '.
            step: after how many updates.
            prompts: an input example.
            tags: the logged model's; `tunix_mlflow.weights_digest` is the bundle's.
            metrics: measured by training, put on the logged model.
            dataset: what they were measured on.

        Raises:
            TrackingError: for a name that MLflow does not take.
        """
        if not name or any(character in name for character in _FORBIDDEN_IN_MODEL_NAMES):
            raise TrackingError(
                f"a model cannot be called {name!r}: MLflow takes none of"
                f" {' '.join(_FORBIDDEN_IN_MODEL_NAMES)}"
            )
        good, bad = split_values(metrics or {})
        self._report_once(bad)
        # With the timestamp of the run's own point, MLflow stores that once.
        stamps = {key: now() for key in good}
        for line in metrics_log.read(self.folder / METRICS_LOG):
            for point in metrics_log.points(line):
                if point.step == step and good.get(point.key) == point.value:
                    stamps[point.key] = point.timestamp
        entity = dataset_entity(dataset) if dataset is not None else None
        self._record(
            records.Model(
                bundle=bundle.resolve().relative_to(self.folder).as_posix(),
                name=name,
                at_step=step,
                prompts=list(prompts),
                tags={str(key): str(value) for key, value in tags.items()},
                metrics=[(key, value, stamps[key], step) for key, value in good.items()],
                dataset=(entity.name, entity.digest) if entity else None,
            )
        )
        self._model_recorded = size(self.folder / EVENT_LOG)

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Record a file, or a folder by its name, as an artifact.

        One from outside the run's folder is copied first, and may be deleted afterwards.

        Args:
            local_path: of the file or folder.
            artifact_path: the artifact folder to put it into; None: the run's.

        Raises:
            TrackingError: if it cannot be read.
        """
        path = Path(local_path)
        parent = posixpath.normpath(artifact_path).strip("/") if artifact_path else ""
        target = posixpath.join(parent, path.name)
        if path.is_dir():
            self.log_artifacts(path, target)
        else:
            self._record(records.Artifact(path=self._inside(path), artifact=target))

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        """Record the content of a folder as artifacts.

        A folder that `manifest.json` seals, as checkpoints are, replaces what is there under
        `artifact_path`, and its manifest is uploaded last. Any other is merged, as in MLflow.

        Raises:
            TrackingError: if it cannot be read.
        """
        inside = self._inside(Path(local_dir))
        names = sorted(path.name for path in (self.folder / inside).iterdir())
        target = posixpath.normpath(artifact_path).strip("/") if artifact_path else ""
        self._record(records.Artifacts(path=inside, artifact=target, names=names))

    def log_text(self, text: str, artifact_file: str) -> None:
        """Record a text as an artifact."""
        self._with_mlflow.log_text(self.run_id, text, artifact_file)

    def log_dict(self, dictionary: Any, artifact_file: str) -> None:
        """Record a dictionary as an artifact, YAML or JSON by the file's ending."""
        self._with_mlflow.log_dict(self.run_id, dictionary, artifact_file)

    def log_figure(
        self, figure: Any, artifact_file: str, *, save_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Record a matplotlib or plotly figure as an artifact."""
        self._with_mlflow.log_figure(self.run_id, figure, artifact_file, save_kwargs=save_kwargs)

    def log_image(
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: SupportsIndex | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Record an image: as the artifact `artifact_file`, or as `key` at a step."""
        at = None if step is None else to_step(step)
        self._with_mlflow.log_image(
            self.run_id, image, artifact_file, key, at, timestamp, synchronous=True
        )

    def log_table(self, data: Mapping[str, Any] | pd.DataFrame, artifact_file: str) -> None:
        """Record a table that the UI shows as one.

        It replaces one of the same name, so that a resumed run may log it again; MLflow's own
        appends.

        Args:
            data: columns by name, of equal length, or a DataFrame.
            artifact_file: path that ends in .json.
        """
        encoded = encode_table(data, artifact_file)
        staged = self._events.stage_bytes(encoded, posixpath.basename(artifact_file))
        self._record(records.Artifact(path=staged, artifact=artifact_file, is_table=True))

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file of the run's folder, and record it as the artifact of the same name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, data)
        self._record(records.Artifact(path=name, artifact=name))

    def delete_artifact(self, path: str) -> None:
        """Delete an artifact of the run, or a folder of them."""
        self._record(records.DeleteArtifact(artifact=path))

    def log_summary(self, step: int) -> dict[str, float]:
        """Record the summary figures of a training, as far as the run has come.

        Returns:
            The figures; empty if the run has no `train/loss`.
        """
        figures = metrics_log.summary(metrics_log.read(self.folder / METRICS_LOG))
        if figures:
            self.log_metrics(figures, step)
        return figures

    def last(self, key: str) -> dict[str, float]:
        """Return the latest value of a metric as {key: value}; empty if it was never recorded."""
        point = metrics_log.last(self.folder / METRICS_LOG, key)
        return {} if point is None else {key: point.value}

    def flush(self) -> None:
        """Make the local record durable."""
        self._metrics.flush()

    @property
    def _with_mlflow(self) -> Recorder:
        if self._recorder is None:
            self._recorder = Recorder(self.log_artifact, self.set_tag)
        return self._recorder

    def _inside(self, path: Path) -> str:
        """Return a file's path below the run's folder, after it was copied there if need be."""
        self._check_open()
        try:
            resolved = path.resolve(strict=True)
            if resolved.is_relative_to(self.folder):
                return resolved.relative_to(self.folder).as_posix()
            return self._events.stage(path)
        except (FileNotFoundError, PermissionError) as error:
            raise TrackingError(f"cannot log {path}: {files.one_line(error)}") from error
        except OSError as error:
            raise UnavailableError(f"cannot copy {path}: {files.one_line(error)}") from error

    def _record(self, record: Record) -> None:
        self._check_open()
        self._put(record)

    def _put(self, record: Record) -> None:
        self._events.put(record)

    def _report_once(self, bad: Mapping[str, str]) -> None:
        for key, why in bad.items():
            if key not in self._named:
                self._named.add(key)
                self.report(f"metric {key[:80]!r} is not recorded: {why}")

    def _check_open(self) -> None:
        if self._is_forked:
            raise TrackingError(
                f"run {self.run_id} is open in the process that this one was forked from; log"
                " there, or start another run here"
            )
        if self._ended:
            raise TrackingError(f"run {self.run_id} has ended; start another, or continue it")
        if self._lost:
            raise UnavailableError(
                f"run {self.run_id}: lease lost to another process while this one was silent;"
                " this one stops"
            )


def dataset_entity(dataset: Dataset | DatasetEntity) -> DatasetEntity:
    """Return what MLflow stores of a dataset."""
    return dataset if isinstance(dataset, DatasetEntity) else dataset._to_mlflow_entity()
