"""From a run folder to MLflow: the one place where records become calls.

Delivering a record twice changes nothing: a run is looked for by its local id before it is made,
parameters keep their first value, tags and artifacts their last, MLflow drops a metric point or an
input that it has.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import msgspec
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.models import flavor
from tunix_mlflow.tracking.record import event_log, metrics_log
from tunix_mlflow.tracking.record.event_log import Cursor, RunLink

BATCH = 1000  # points in one request; MLflow takes no more
LOCAL_ID_TAG = "tunix_mlflow.local_id"
_PARAM_LIMIT, _TAG_LIMIT = 6000, 5000
_TABLES_TAG = "mlflow.loggedArtifacts"


class Undeliverable(Exception):
    """MLflow will never take this record."""


def step(client: MlflowClient, folder: Path, report: Callable[[str], None]) -> bool:
    """Deliver the next record, or the next batch of metrics, and move the cursor.

    A record that MLflow will never take is reported, and passed over.

    Returns:
        False when there was nothing to deliver.

    Raises:
        Exception: what MLflow's client raises while the server is away; nothing was moved.
    """
    at = event_log.cursor(folder)
    if at.journal > event_log.size(folder / metrics_log.METRICS_LOG):  # a machine lost its power
        at = Cursor(at.outbox, 0)
    line = _next_line(folder / event_log.EVENT_LOG, at.outbox)
    if line is not None:
        try:
            deliver(client, folder, json.loads(line))
        except Undeliverable as error:
            report(f"not recorded in MLflow: {error}")
        event_log.move_cursor(folder, Cursor(at.outbox + len(line), at.journal))
        return True
    whole = _some_lines(folder / metrics_log.METRICS_LOG, at.journal)
    if not whole:
        return False
    metrics = [
        Metric(p.key, p.value, p.timestamp, p.step)
        for raw in whole.splitlines()
        for p in metrics_log.points(json.loads(raw))
    ]
    run_id = _known(folder).run_id
    refused: dict[str, str] = {}
    for start in range(0, len(metrics), BATCH):
        refused |= _log(client, run_id, metrics[start : start + BATCH])
    for key, why in refused.items():
        report(f"points of {key[:80]!r} are not recorded in MLflow: {why}")
    event_log.move_cursor(folder, Cursor(at.outbox, at.journal + len(whole)))
    return True


def deliver(client: MlflowClient, folder: Path, record: dict[str, Any]) -> None:
    """Tell MLflow one thing.

    Raises:
        Undeliverable: when it will never take it.
        Exception: what MLflow's client raises while the server is away.
    """
    fields = dict(record)
    op = fields.pop("op")
    try:
        _OPERATIONS[op](client, folder, **fields)
    except MlflowException as error:
        if op != "create" and _is_refusal(client, _known(folder).run_id, error):
            raise Undeliverable(f"{op}: {store.one_line(error)}") from error
        raise


def _is_refusal(client: MlflowClient, run_id: str, error: MlflowException) -> bool:
    """Whether MLflow will never take what it did not take.

    Not when the run is not there: this may be the wrong server, or one that is half up. Nor when
    it was deleted, for it can be restored.
    """
    if error.error_code != "INVALID_PARAMETER_VALUE":
        return False
    return bool(client.get_run(run_id).info.lifecycle_stage == "active")


def _log(client: MlflowClient, run_id: str, metrics: list[Metric]) -> dict[str, str]:
    """Log metrics; of a batch that is refused, all but those that are the reason.

    Returns:
        Why, by the names of those.
    """
    try:
        client.log_batch(run_id, metrics=metrics)
    except MlflowException as error:
        if not _is_refusal(client, run_id, error):
            raise
        if len(metrics) == 1:
            return {metrics[0].key: store.one_line(error)}
        half = len(metrics) // 2
        return _log(client, run_id, metrics[:half]) | _log(client, run_id, metrics[half:])
    return {}


def _create(
    client: MlflowClient,
    folder: Path,
    *,
    name: str,
    experiment: str | None,
    tags: dict[str, str],
    parent: str | None,
    start_time: int,
) -> None:
    if event_log.known(folder) is not None:
        return
    experiment_id = store.experiment_id(client, experiment)
    local_id = folder.name
    found = client.search_runs([experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{local_id}'")
    if found:  # a process died after it made the run
        run_id = found[0].info.run_id
    else:
        if parent is not None:
            above = event_log.known(paths.run_dir(parent))
            if above is None:
                raise ConnectionError(f"MLflow has not heard of the parent, {parent}, yet")
            tags = tags | {"mlflow.parentRunId": above.run_id}
        made = client.create_run(
            experiment_id, start_time, tags | {LOCAL_ID_TAG: local_id}, run_name=name
        )
        run_id = made.info.run_id
    adopt(folder, run_id, experiment_id)


def adopt(folder: Path, run_id: str, experiment_id: str) -> None:
    """Remember that a folder is this MLflow run's, and make it findable by MLflow's id."""
    uri = store.public(mlflow.get_tracking_uri())
    event_log.set_known(folder, RunLink(run_id, experiment_id, uri))
    link = paths.run_dir(run_id)
    if folder != link and not link.exists():
        link.symlink_to(folder.name)


def _params(client: MlflowClient, folder: Path, *, params: dict[str, str]) -> None:
    run_id = _known(folder).run_id
    have = client.get_run(run_id).data.params
    new = [Param(k, v[:_PARAM_LIMIT]) for k, v in params.items() if k not in have]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])


def _tags(client: MlflowClient, folder: Path, *, tags: dict[str, str]) -> None:
    client.log_batch(
        _known(folder).run_id, tags=[RunTag(k, v[:_TAG_LIMIT]) for k, v in tags.items()]
    )


def _untag(client: MlflowClient, folder: Path, *, name: str) -> None:
    run_id = _known(folder).run_id
    if name in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, name)


def _dataset(client: MlflowClient, folder: Path, *, dataset: dict[str, str], usage: str) -> None:
    given = DatasetInput(DatasetEntity(**dataset), [InputTag("mlflow.data.context", usage)])
    client.log_inputs(_known(folder).run_id, [given])


def _model_input(client: MlflowClient, folder: Path, *, model_id: str) -> None:
    client.log_inputs(_known(folder).run_id, models=[LoggedModelInput(model_id)])


def _artifact(client: MlflowClient, folder: Path, *, path: str, artifact: str) -> None:
    """A file, or a folder whose manifest.json goes last: it says that all is there."""
    source = folder / path
    if not source.exists():
        return  # a newer checkpoint took its place
    run_id = _known(folder).run_id
    try:
        if source.is_dir():
            # Another of the same name would leave files that are not in the manifest.
            store.delete_artifacts(client, run_id, artifact)
            children = sorted(source.iterdir(), key=lambda child: child.name == "manifest.json")
            for child in children:
                if child.is_dir():
                    client.log_artifacts(run_id, str(child), f"{artifact}/{child.name}")
                else:
                    client.log_artifact(run_id, str(child), artifact)
            return
        # A copy: the journal grows while it is sent.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            copy = Path(scratch) / Path(artifact).name
            shutil.copyfile(source, copy)
            client.log_artifact(run_id, str(copy), str(Path(artifact).parent).strip("."))
    except FileNotFoundError:
        if source.exists():
            raise


def _no_artifact(client: MlflowClient, folder: Path, *, artifact: str) -> None:
    store.delete_artifacts(client, _known(folder).run_id, artifact)


def _table(client: MlflowClient, folder: Path, *, artifact: str) -> None:
    # The UI finds tables by this tag, which MLflow's own log_table sets too.
    run_id = _known(folder).run_id
    shown = json.loads(client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
    entry = {"path": artifact, "type": "table"}
    if entry not in shown:
        client.set_tag(run_id, _TABLES_TAG, json.dumps([*shown, entry]))


def _figures(
    client: MlflowClient,
    folder: Path,
    *,
    figures: dict[str, float],
    timestamp: int,
    model_id: str | None,
    dataset: list[str] | None,
) -> None:
    name, digest = dataset or (None, None)
    run_id = _known(folder).run_id
    client.log_batch(
        run_id,
        metrics=[
            Metric(
                key,
                value,
                timestamp,
                0,
                model_id=model_id,
                dataset_name=name,
                dataset_digest=digest,
                run_id=run_id,
            )
            for key, value in figures.items()
        ],
    )


def _model(
    client: MlflowClient,
    folder: Path,
    *,
    bundle: str,
    at_step: int,
    prompts: list[str],
    tags: dict[str, str],
) -> None:
    mine = _known(folder)
    if not (folder / bundle / "manifest.json").is_file():
        raise Undeliverable(f"the model in {folder / bundle} is gone")
    tags = tags | {"tunix_mlflow.step": str(at_step)}
    of_run = f"source_run_id = '{mine.run_id}'"
    logged = None
    for one in client.search_logged_models([mine.experiment_id], of_run):
        same = all(
            one.tags.get(k) == tags[k] for k in ("tunix_mlflow.weights_digest", "tunix_mlflow.step")
        )
        if same and str(one.status) in ("READY", "PENDING"):
            logged = one  # a process died after it made it
    if logged is None:
        # Not by Model.log, which takes the experiment of this thread's active run: it has none.
        params = client.get_run(mine.run_id).data.params
        logged = client.create_logged_model(
            mine.experiment_id, "model", mine.run_id, tags, params, "decoder"
        )
    if str(logged.status) != "READY":
        flavor.log_model(
            folder / bundle,
            model_id=logged.model_id,
            run_id=mine.run_id,
            step=at_step,
            prompts=prompts,
            weights_digest=tags["tunix_mlflow.weights_digest"],
        )
    event_log.set_known(folder, msgspec.structs.replace(mine, model_id=logged.model_id))


def _status(
    client: MlflowClient, folder: Path, *, status: str, end_time: int, run_id: str | None = None
) -> None:
    client.set_terminated(run_id or _known(folder).run_id, status, end_time)


def _running(client: MlflowClient, folder: Path) -> None:
    client.update_run(_known(folder).run_id, status="RUNNING")


def _launcher(client: MlflowClient, folder: Path, *, run_id: str) -> None:
    client.set_tag(run_id, store.LAUNCHER_TAG, _known(folder).run_id)


def _experiment_kind(client: MlflowClient, folder: Path) -> None:
    store.mark_experiment(client, _known(folder).experiment_id)


_OPERATIONS: dict[str, Callable[..., None]] = {
    "create": _create,
    "params": _params,
    "tags": _tags,
    "untag": _untag,
    "dataset": _dataset,
    "model_input": _model_input,
    "artifact": _artifact,
    "no_artifact": _no_artifact,
    "table": _table,
    "figures": _figures,
    "model": _model,
    "status": _status,
    "launcher": _launcher,
    "running": _running,
    "experiment_kind": _experiment_kind,
}


def _known(folder: Path) -> RunLink:
    found = event_log.known(folder)
    if found is None:
        raise Undeliverable(f"{folder} has no MLflow run")
    return found


def _next_line(path: Path, start: int) -> bytes | None:
    if not path.exists():
        return None
    with path.open("rb") as handle:
        handle.seek(start)
        line = handle.readline()
    return line if line.endswith(b"\n") else None


def _some_lines(path: Path, start: int) -> bytes:
    """Whole lines that hold about BATCH points."""
    if not path.exists():
        return b""
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read(256_000)
        if data and b"\n" not in data:
            data += handle.readline()
    end, count = 0, 0
    for raw in data.splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        count += max(1, raw.count(b":") - 3)  # step, timestamp, metrics
        if end and count > BATCH:
            break
        end += len(raw)
    return data[:end]


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
