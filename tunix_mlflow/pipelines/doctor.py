"""Check what a run needs, before it begins: stores, registry, clock, device, memory, disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import mlflow
import requests
from mlflow.tracking import MlflowClient
from packaging.requirements import Requirement

from tunix_mlflow import paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.runtime import devices, memory
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.download import download_artifact
from tunix_mlflow.tracking.record.cursor import pending_bytes, read_cursor
from tunix_mlflow.tracking.record.folder import is_open
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.sync.answers import understand

NAME = "tunix-mlflow-doctor"
"""The experiment of the trial; it stays, without runs."""
_FREE_BYTES = 2 * 10**9
_CLOCK_SECONDS = 30.0


class Finding(NamedTuple):
    """What one check found."""

    name: str
    ok: bool
    text: str
    remedy: str | None = None  # what to do, if it is not well


@store.restored()
def examine(*, reporter: Reporter = SILENT) -> list[Finding]:
    """Check what runs need: stores, registry, clock, device, memory, disk, versions.

    A run, an artifact and a registered model are made in the stores of this environment, and
    deleted again.

    Args:
        reporter: receives a line for each finding, as it is found.
    """
    found: list[Finding] = []
    for finding in _findings():
        mark = "ok  " if finding.ok else "FAIL"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        reporter.info(f"{mark} {finding.name}: {finding.text}{remedy}")
        found.append(finding)
    return found


def _findings() -> Iterator[Finding]:
    yield from _versions()
    yield _state()
    yield _undelivered()
    yield _device()
    yield _memory()
    tracking = _timed("tracking store", _reach)
    yield tracking
    if tracking.ok:
        yield from _stores(MlflowClient())
        yield _clock()


def _timed(name: str, trial: Callable[[], str], remedy: str | None = None) -> Finding:
    """Return what came of a trial, with its time."""
    begun = time.monotonic()
    try:
        text = trial()
    except Exception as error:  # each client has its own
        return Finding(name, False, understand(error).why, remedy)
    return Finding(name, True, f"{text} ({1000 * (time.monotonic() - begun):.0f} ms)")


def _reach() -> str:
    store.connect(TrackingConfig())
    return store.public(mlflow.get_tracking_uri())


def _stores(client: MlflowClient) -> Iterator[Finding]:
    """Make, read and delete a run, an artifact and a registered model."""
    name = f"{NAME}-{os.getpid()}-{time.time_ns()}"
    run_id = ""

    def write() -> str:
        nonlocal run_id
        experiment = store.find_experiment(client, NAME, None)
        run_id = client.create_run(experiment, run_name=name).info.run_id
        client.log_metric(run_id, "trial", 1.0)
        client.set_tag(run_id, "trial", "1")
        return f"a run of experiment {NAME} was written"

    def round_trip() -> str:
        with tempfile.TemporaryDirectory() as scratch:
            sent = Path(scratch) / "trial.bin"
            sent.write_bytes(os.urandom(1_000_000))
            client.log_artifact(run_id, str(sent))
            back = download_artifact(client, run_id, sent.name, Path(scratch) / "back")
            if back.read_bytes() != sent.read_bytes():
                raise OSError("what came back is not what was sent")
        uri = client.get_run(run_id).info.artifact_uri
        return f"1 MB to {store.public(uri)} and back"

    def delete_artifact() -> str:
        store.delete_artifacts(client, run_id, "trial.bin")
        return "an artifact was deleted"

    def register() -> str:
        client.create_registered_model(name)
        source = client.get_run(run_id).info.artifact_uri
        version = client.create_model_version(name, source, run_id, await_creation_for=0)
        client.set_registered_model_alias(name, "trial", version.version)
        return "a model was registered, and an alias moved"

    def delete() -> str:
        if client.search_registered_models(f"name = '{name}'"):
            client.delete_registered_model(name)
        client.delete_run(run_id)
        return "run and registered model were deleted"

    written = _timed("write", write, "ask for the permission to write runs")
    yield written
    if written.ok:
        yield _timed(
            "artifact store",
            round_trip,
            "install its client library, or ask for the permission to write artifacts",
        )
        yield _timed(
            "delete artifacts", delete_artifact, "checkpoints that are no longer needed will stay"
        )
        yield _timed("registry", register, "promotion will fail; ask for the permission")
    if run_id:
        yield _timed("delete", delete, f"delete {name} by hand")


def _clock() -> Finding:
    """Compare the clock with the server's; a local store has none of its own."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        return Finding("clock", True, "the store is on this machine")
    try:
        date = requests.get(f"{uri.rstrip('/')}/health", timeout=10).headers["Date"]
        apart = time.time() - parsedate_to_datetime(date).timestamp()
    except (requests.RequestException, KeyError, ValueError):
        return Finding("clock", True, "the server does not say its time")
    text = f"{abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the server's"
    well = abs(apart) < _CLOCK_SECONDS
    return Finding("clock", well, text, None if well else "set this machine's clock")


def _versions() -> Iterator[Finding]:
    """Compare what is installed with the versions that are tested."""
    wrong = []
    for line in metadata.requires("tunix-mlflow") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if have not in wanted.specifier:
            wrong.append(f"{wanted.name} {have}, tested with {wanted.specifier}")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlflow", "jax", "flax"))
    remedy = "install tunix-mlflow again, with its requirements" if wrong else None
    yield Finding("versions", not wrong, "; ".join(wrong) or shown, remedy)


def _state() -> Finding:
    root = paths.root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as trial:
            trial.write(b"trial")
        free = shutil.disk_usage(root).free
    except OSError as error:
        return Finding("state", False, f"{root}: {error.strerror}", f"set {paths.HOME_VARIABLE}")
    text = f"{root}, {free / 1e9:.1f} GB free"
    well = free > _FREE_BYTES
    return Finding("state", well, text, None if well else "free some space")


def _undelivered() -> Finding:
    waiting = refused = 0
    for path in lookup.folders():
        if not is_open(path):
            waiting += bool(pending_bytes(path))
            refused += bool(read_cursor(path).offered)
    text = f"{waiting} runs with records that MLflow does not have, {refused} with refused ones"
    well = not (waiting or refused)
    return Finding("undelivered", well, text, None if well else "run tunix-mlflow sync")


def _device() -> Finding:
    try:
        device = devices.use("auto")
    except Exception as error:  # of a plugin
        return Finding("device", False, understand(error).why, "set device=cpu")
    return Finding("device", True, f"{device} ({device.device_kind})")


def _memory() -> Finding:
    found = memory.available()
    return Finding("memory", True, f"{found.bytes / 1e9:.1f} GB, limited by {found.source}")
