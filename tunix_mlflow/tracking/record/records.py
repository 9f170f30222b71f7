"""What a run records besides metrics: typed records, one a line of events.jsonl.

A line is {"version", "checksum", "record"}; the checksum is the CRC-32 of the record's JSON text,
so that a record that a disk has damaged is told from one that can be delivered.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

VERSION = 1

Lane: TypeAlias = Literal["fields", "metrics", "artifacts", "models", "status"]
"""What is delivered in order among its own kind, and waits for no other kind.

fields: params, tags, inputs. status waits for all others, since it says that they are there.
"""
RECORD_LANES: tuple[Lane, ...] = ("fields", "artifacts", "models", "status")
"""The lanes of events.jsonl; metrics have a file of their own."""


class _Record(Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    pass


class Create(_Record, frozen=True, tag="create"):
    """The run itself, which began while MLflow was away."""

    name: str | None
    experiment: str | None
    experiment_id: str | None
    tags: dict[str, str]
    parent: str | None
    start_time: int  # milliseconds since 1970


class Begin(_Record, frozen=True, tag="begin"):
    """A run is continued that had ended."""


class Params(_Record, frozen=True, tag="params"):
    """Parameters; those that the run has keep their value."""

    params: dict[str, str]
    name_conflicts: bool = False  # report those that the run has with another value


class Tags(_Record, frozen=True, tag="tags"):
    """Tags; later values win."""

    tags: dict[str, str]


class DeleteTag(_Record, frozen=True, tag="delete_tag"):
    """A tag that is no longer so."""

    name: str


class Input(_Record, frozen=True, tag="input"):
    """A dataset that the run used."""

    dataset: dict[str, Any]  # the fields of MLflow's Dataset
    tags: dict[str, str]


class ModelInput(_Record, frozen=True, tag="model_input"):
    """A logged model that the run used."""

    model_id: str


class Launcher(_Record, frozen=True, tag="launcher"):
    """A run that `mlflow run` made only to continue this one."""

    run_id: str


class ExperimentKind(_Record, frozen=True, tag="experiment_kind"):
    """The UI shall show the run's experiment as one of training."""


class Artifact(_Record, frozen=True, tag="artifact"):
    """A file; `path` is below the run's folder."""

    path: str
    artifact: str
    is_table: bool = False


class Artifacts(_Record, frozen=True, tag="artifacts"):
    """The content of a folder; `path` is below the run's folder."""

    path: str
    artifact: str
    names: list[str]  # in the folder, at its top


class DeleteArtifact(_Record, frozen=True, tag="delete_artifact"):
    """An artifact, or a folder of them, that is no longer needed."""

    artifact: str


class Model(_Record, frozen=True, tag="model"):
    """A logged model; `bundle` is below the run's folder."""

    bundle: str
    name: str
    at_step: int
    prompts: list[str]
    tags: dict[str, str]
    metrics: list[tuple[str, float, int, int]]  # key, value, timestamp, step
    dataset: tuple[str, str] | None  # name and digest


class Status(_Record, frozen=True, tag="status"):
    """How the run, or the one that launched it, ended."""

    status: str
    end_time: int  # milliseconds since 1970
    run_id: str | None = None


Record: TypeAlias = (
    Create
    | Begin
    | Params
    | Tags
    | DeleteTag
    | Input
    | ModelInput
    | Launcher
    | ExperimentKind
    | Artifact
    | Artifacts
    | DeleteArtifact
    | Model
    | Status
)


class Unreadable(Exception):
    """A line is not a record that this version can read; the message says why."""


class _Line(Struct, frozen=True):
    version: int
    checksum: str
    record: msgspec.Raw


_lines, _records = msgspec.json.Decoder(_Line), msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """Return a record as a line."""
    text = msgspec.json.encode(record)
    return msgspec.json.encode(_Line(VERSION, _checksum(text), msgspec.Raw(text))) + b"\n"


def decode(line: bytes) -> Record:
    """Return the record of a line.

    Raises:
        Unreadable: if it is damaged, or of a version that is newer than this one.
    """
    try:
        outer = _lines.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"damaged: {error}") from error
    if outer.version > VERSION:
        raise Unreadable(f"written by a newer tunix-mlflow (record version {outer.version})")
    if _checksum(bytes(outer.record)) != outer.checksum:
        raise Unreadable("damaged: its checksum is not that of its content")
    try:
        record: Record = _records.decode(outer.record)
    except msgspec.DecodeError as error:
        raise Unreadable(f"not a record that this tunix-mlflow knows: {error}") from error
    return record


def lane_of(record: Record) -> Lane:
    """Return the lane of a record."""
    match record:
        case Artifact() | Artifacts() | DeleteArtifact():
            return "artifacts"
        case Model():
            return "models"
        case Status() | Begin():
            return "status"
        case _:
            return "fields"


def describe(record: Record) -> str:
    """Return a record in a few words, for messages."""
    match record:
        case Artifact(artifact=name) | Artifacts(artifact=name):
            return f"artifact {name or '(folder)'}"
        case DeleteArtifact(artifact=name):
            return f"deletion of artifact {name}"
        case Model(name=name):
            return f"model {name!r}"
        case Params(params=items) | Tags(tags=items):
            kind = "params" if isinstance(record, Params) else "tags"
            return f"{kind} {', '.join(list(items)[:3])}{', ...' if len(items) > 3 else ''}"
        case DeleteTag(name=name):
            return f"deletion of tag {name}"
        case Input(dataset=dataset):
            return f"input {dataset.get('name', '')}"
        case _:
            return str(record.__struct_config__.tag).replace("_", " ")


def _checksum(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"
