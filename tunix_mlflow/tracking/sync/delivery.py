"""From a run's folder to MLflow: the one place where records become calls.

Delivering a record twice changes nothing: a run is looked for by its local id before it is made,
parameters keep their first value, tags and artifacts their last, MLflow drops a metric point or an
input that it has.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LoggedModelInput,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tunix_mlflow import paths
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking import tags as names
from tunix_mlflow.tracking.record import event_log, metrics_log
from tunix_mlflow.tracking.record.event_log import Cursor
from tunix_mlflow.tracking.record.folder import (
    EVENT_LOG,
    METRICS_LOG,
    STAGED,
    RunLink,
    read_link,
    write_link,
)
from tunix_mlflow.tracking.sync import logged_model, metrics
from tunix_mlflow.tracking.sync.refusal import Undeliverable, is_refusal

_PER_REQUEST = 100  # params or tags
_PARAM_LIMIT, _TAG_LIMIT = 6000, 5000  # characters; MLflow would cut or refuse longer ones
_TABLES_TAG = "mlflow.loggedArtifacts"
_SEAL = "manifest.json"


def deliver_next(client: MlflowClient, folder: Path, report: Callable[[str], None]) -> bool:
    """Deliver the next record, or the next batch of metrics, and move the cursor.

    Records go before metrics, except a status: a run ends when its metrics are there. A record
    that MLflow will never take is reported, and passed over.

    Returns:
        False when there was nothing to deliver.

    Raises:
        Exception: what MLflow's client raises while the server is away; nothing was moved.
    """
    at = event_log.read_cursor(folder)
    if at.metrics > event_log.size(folder / METRICS_LOG):  # a machine lost its power
        at = Cursor(at.events, 0)
    line = _next_line(folder / EVENT_LOG, at.events)
    if line is not None:
        record = json.loads(line)
        if record["op"] == "status" and _deliver_metrics(client, folder, at, report):
            return True
        try:
            deliver(client, folder, record)
        except Undeliverable as error:
            report(f"not recorded in MLflow: {error}")
        event_log.move_cursor(folder, Cursor(at.events + len(line), at.metrics))
        return True
    return _deliver_metrics(client, folder, at, report)


def deliver(client: MlflowClient, folder: Path, record: dict[str, Any]) -> None:
    """Make the calls of one record.

    Raises:
        Undeliverable: when MLflow will never take it.
        Exception: what MLflow's client raises while the server is away.
    """
    fields = dict(record)
    op = fields.pop("op")
    try:
        _OPERATIONS[op](client, folder, **fields)
    except MlflowException as error:
        if op != "create" and is_refusal(client, _link(folder).run_id, error):
            raise Undeliverable(f"{op}: {one_line(error)}") from error
        raise


def adopt(folder: Path, run_id: str, experiment_id: str) -> None:
    """Record that a folder belongs to this MLflow run, and make it findable by MLflow's id."""
    uri = store.public(mlflow.get_tracking_uri())
    before = read_link(folder)
    model_id = before.model_id if before is not None and before.run_id == run_id else None
    write_link(folder, RunLink(run_id, experiment_id, uri, model_id))
    alias = paths.run_dir(run_id)
    if folder != alias and not alias.exists():
        alias.symlink_to(folder.name)


def _deliver_metrics(
    client: MlflowClient, folder: Path, at: Cursor, report: Callable[[str], None]
) -> bool:
    """Deliver the next batch of metrics; False if there is none."""
    lines = metrics.some_lines(folder / METRICS_LOG, at.metrics)
    if not lines:
        return False
    run_id = _link(folder).run_id
    points = [p for raw in lines.splitlines() for p in metrics_log.points(json.loads(raw))]
    for key, why in metrics.log_points(client, run_id, points).items():
        report(f"points of {key[:80]!r} are not recorded in MLflow: {why}")
    event_log.move_cursor(folder, Cursor(at.events, at.metrics + len(lines)))
    return True


def _create(
    client: MlflowClient,
    folder: Path,
    *,
    name: str | None,
    experiment: str | None,
    experiment_id: str | None,
    tags: dict[str, str],
    parent: str | None,
    start_time: int,
) -> None:
    if read_link(folder) is not None:
        return
    experiment_id = store.find_experiment(client, experiment, experiment_id)
    local_id = folder.name
    found = client.search_runs([experiment_id], f"tags.`{names.LOCAL_ID}` = '{local_id}'")
    if found:  # a process died after it made the run
        run_id = found[0].info.run_id
    else:
        if parent is not None:
            if paths.run_dir(parent).exists():
                above = read_link(paths.run_dir(parent))
                if above is None:
                    raise ConnectionError(f"MLflow does not have the parent run, {parent}, yet")
                parent = above.run_id
            tags = tags | {names.PARENT: parent}
        created = client.create_run(
            experiment_id, start_time, tags | {names.LOCAL_ID: local_id}, run_name=name
        )
        run_id = created.info.run_id
    adopt(folder, run_id, experiment_id)


def _params(
    client: MlflowClient, folder: Path, *, params: dict[str, str], name_conflicts: bool = False
) -> None:
    run_id = _link(folder).run_id
    have = client.get_run(run_id).data.params
    new = [Param(k, v[:_PARAM_LIMIT]) for k, v in params.items() if k not in have]
    for start in range(0, len(new), _PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + _PER_REQUEST])
    if name_conflicts:
        conflicts = [
            f"{key} is {have[key][:80]!r} already, not {value[:80]!r}"
            for key, value in params.items()
            if key in have and have[key] != value[:_PARAM_LIMIT]
        ]
        if conflicts:
            raise Undeliverable(f"params: {'; '.join(conflicts)}")


def _tags(client: MlflowClient, folder: Path, *, tags: dict[str, str]) -> None:
    items = [RunTag(k, v[:_TAG_LIMIT]) for k, v in tags.items()]
    for start in range(0, len(items), _PER_REQUEST):
        client.log_batch(_link(folder).run_id, tags=items[start : start + _PER_REQUEST])


def _delete_tag(client: MlflowClient, folder: Path, *, name: str) -> None:
    run_id = _link(folder).run_id
    if name in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, name)


def _input(
    client: MlflowClient, folder: Path, *, dataset: dict[str, str], tags: dict[str, str]
) -> None:
    given = DatasetInput(DatasetEntity(**dataset), [InputTag(k, v) for k, v in tags.items()])
    client.log_inputs(_link(folder).run_id, [given])


def _model_input(client: MlflowClient, folder: Path, *, model_id: str) -> None:
    run_id = _link(folder).run_id
    inputs = client.get_run(run_id).inputs
    if model_id not in {given.model_id for given in (inputs.model_inputs if inputs else [])}:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])


def _artifact(client: MlflowClient, folder: Path, *, path: str, artifact: str) -> None:
    """Upload a file; a staged copy is deleted afterwards."""
    source = folder / path
    if not source.exists():
        return  # it was uploaded, or another one took its place
    run_id = _link(folder).run_id
    try:
        # A copy: a metrics log grows while it is sent.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            copy = Path(scratch) / Path(artifact).name
            shutil.copyfile(source, copy)
            client.log_artifact(run_id, str(copy), str(Path(artifact).parent).strip(".") or None)
    except FileNotFoundError:
        if source.exists():
            raise
    _delete_staged(folder, path)


def _artifacts(client: MlflowClient, folder: Path, *, path: str, artifact: str) -> None:
    """Upload the content of a folder.

    One that manifest.json seals replaces what is there under its name, and the manifest goes last:
    it says that all is there. Any other is merged with what is there, as MLflow does.
    """
    source = folder / path
    if not source.exists():
        return  # it was uploaded, or a newer checkpoint took its place
    run_id = _link(folder).run_id
    try:
        if not artifact or not (source / _SEAL).exists():
            client.log_artifacts(run_id, str(source), artifact or None)
        else:
            # Another of the same name would leave files that are not in the manifest.
            store.delete_artifacts(client, run_id, artifact)
            for child in sorted(source.iterdir(), key=lambda child: child.name == _SEAL):
                if child.is_dir():
                    client.log_artifacts(run_id, str(child), f"{artifact}/{child.name}")
                else:
                    client.log_artifact(run_id, str(child), artifact)
    except FileNotFoundError:
        if source.exists():
            raise
    _delete_staged(folder, path)


def _delete_staged(folder: Path, path: str) -> None:
    if path.startswith(f"{STAGED}/"):
        shutil.rmtree(folder / STAGED / path.split("/")[1], ignore_errors=True)


def _delete_artifact(client: MlflowClient, folder: Path, *, artifact: str) -> None:
    store.delete_artifacts(client, _link(folder).run_id, artifact)


def _table(client: MlflowClient, folder: Path, *, artifact: str) -> None:
    # The UI finds tables by this tag, which MLflow's own log_table sets too.
    run_id = _link(folder).run_id
    shown = json.loads(client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
    entry = {"path": artifact, "type": "table"}
    if entry not in shown:
        client.set_tag(run_id, _TABLES_TAG, json.dumps([*shown, entry]))


def _model(client: MlflowClient, folder: Path, **fields: Any) -> None:
    logged_model.log_model(client, folder, _link(folder), **fields)


def _status(
    client: MlflowClient, folder: Path, *, status: str, end_time: int, run_id: str | None = None
) -> None:
    store.end_run(client, run_id or _link(folder).run_id, status, end_time)


def _begin(client: MlflowClient, folder: Path) -> None:
    client.update_run(_link(folder).run_id, status="RUNNING")


def _launcher(client: MlflowClient, folder: Path, *, run_id: str) -> None:
    client.set_tag(run_id, names.LAUNCHER_OF, _link(folder).run_id)


def _experiment_kind(client: MlflowClient, folder: Path) -> None:
    store.mark_experiment(client, _link(folder).experiment_id)


_OPERATIONS: dict[str, Callable[..., None]] = {
    "create": _create,
    "begin": _begin,
    "params": _params,
    "tags": _tags,
    "delete_tag": _delete_tag,
    "input": _input,
    "model_input": _model_input,
    "artifact": _artifact,
    "artifacts": _artifacts,
    "delete_artifact": _delete_artifact,
    "table": _table,
    "model": _model,
    "status": _status,
    "launcher": _launcher,
    "experiment_kind": _experiment_kind,
}


def _link(folder: Path) -> RunLink:
    found = read_link(folder)
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
