"""The operations on datasets, as the command line and the stages use them."""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from tunix_mlflow import paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, catalog, files, formats, parsing, seeds, snapshot, staging
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog import Report
from tunix_mlflow.data.examples import Example
from tunix_mlflow.data.leakage import Leakage
from tunix_mlflow.data.manifest import Manifest, Selection
from tunix_mlflow.errors import DatasetError, IntegrityError, Refused

SMALL = 100_000
"""Examples up to which a dataset gets its snapshot at once; a larger one when first used."""
_STALE_SECONDS = 24 * 3600


class Built(NamedTuple):
    """A manifest and whether this call made it (False: the same was there)."""

    manifest: Manifest
    created: bool


class Ingested(NamedTuple):
    """What an ingest did."""

    manifest: Manifest
    created: bool
    form: str
    rows: int
    duplicates: int
    rejected: int


def seed(
    key: str,
    *,
    num_traces: int | None = None,
    number: int | None = None,
    name: str | None = None,
) -> Built:
    """Generate a dataset into the catalog; the same one twice changes nothing.

    Args:
        key: the seed's, and unless `name` is given the dataset's.
        num_traces: how many; None for the seed's own number.
        number: the random seed; None for 42.
        name: the key to store it under.

    Raises:
        DatasetError: for an unknown seed, a count it refuses, or a key that is taken.
    """
    found = seeds.find(key)
    if found is None:
        raise DatasetError(
            f"there is no seed {key!r}; there are: {', '.join(seeds.names())}, {seeds.GYM}FAMILY"
        )
    stored_as = name or seeds.dataset_key(key)
    manifests.parse_key(stored_as)
    count = found.default_traces if num_traces is None else num_traces
    number = seeds.DEFAULT_SEED if number is None else number
    request = {
        "seed": key,
        "number": number,
        "num_traces": count,
        "splits": dict(manifests.HELD_OUT),
    }
    with staging.new_stage() as stage:
        stage.add_all(seeds.examples(found, number=number, count=count))
        built = Built(*catalog.ingest(paths.catalog_path(), stage, stored_as, request, []))
    _snapshot_if_small(built.manifest)
    return built


def ingest(
    named: Sequence[str] | Path,
    key: str,
    *,
    form: str = "auto",
    mapping: Mapping[str, str] | None = None,
    splits: Mapping[str, float] | None = None,
    limits: LimitsConfig | None = None,
    skip_bad: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ingested:
    """Store the examples of files as a dataset: all of them, or none.

    Args:
        named: paths of files or folders, or SPLIT=PATH.
        key: of the dataset.
        form: one of formats.FORMATS, or auto.
        mapping: field -> the column it stands in.
        splits: shares of the prompts, used when the data has no splits; None: a tenth for test.
        limits: lengths that are taken; None for the defaults.
        skip_bad: leave bad rows out, and write them to this file with the reasons.
        progress: called with bytes done and bytes in all.

    Raises:
        DatasetError: naming file and line of the bad rows; nothing was stored.
    """
    manifests.parse_key(key)
    mapping = dict(mapping or {})
    for field in mapping:
        if field not in formats.FIELDS:
            raise DatasetError(f"--map {field}: no such field; one of {', '.join(formats.FIELDS)}")
    if form != "auto" and form not in formats.FORMATS:
        raise DatasetError(f"no format {form!r}; one of auto, {', '.join(formats.FORMATS)}")
    wanted = dict(manifests.HELD_OUT if splits is None else splits)
    manifests.bounds(wanted)
    words = [str(named)] if isinstance(named, Path) else list(named)
    sources = files.sources(words)
    path = paths.catalog_path()
    with staging.new_stage() as stage:
        parsed = parsing.of_files(
            stage,
            sources,
            form=form,
            mapping=mapping,
            limits=limits or LimitsConfig(),
            skip_bad=skip_bad is not None,
            progress=progress,
        )
        if not stage.rows:
            raise DatasetError(f"{', '.join(words)} holds no {parsed.form} rows that can be used")
        rejects = list(parsed.rejects)
        if skip_bad is not None:
            torn = catalog.conflicts(path, stage)
            rejects += [
                parsing.Reject(
                    f"{sources[c.source].path}:{c.number}",
                    f"its prompt stands in another split than {c.split!r} too",
                    c.canonical[:2_000],
                )
                for c in torn
            ]
            stage = stage.without({c.digest for c in torn}) if torn else stage
        request = {"ingest": parsed.form, "splits": wanted}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"ingested_at": now, "version": importlib.metadata.version("tunix-mlflow")}
        manifest, created = catalog.ingest(
            path, stage, key, request, [source | about for source in parsed.sources]
        )
        duplicates = stage.rows - manifest.count
        rows = sum(source["rows"] for source in parsed.sources)
    if skip_bad is not None:
        with _whole(skip_bad) as part, part.open("w", encoding="utf-8") as out:
            parsing.write_rejects(out, rejects)
    _snapshot_if_small(manifest)
    return Ingested(manifest, created, parsed.form, rows, duplicates, len(rejects))


def build(key: str, selection: Selection) -> Built:
    """Make a dataset of examples that the catalog has.

    Raises:
        DatasetError: if nothing is selected, or the key is taken.
    """
    manifests.parse_key(key)
    if selection.parent is not None:
        manifests.parse_key(selection.parent)
    if selection.order == "all" and selection.limit is not None:
        raise DatasetError("`all` takes no limit; select latest or random")
    if not paths.catalog_path().exists():
        raise DatasetError(f"there is no catalog at {paths.catalog_path()} yet; ingest first")
    built = Built(*catalog.build(paths.catalog_path(), key, selection))
    _snapshot_if_small(built.manifest)
    return built


def get(key: str) -> Manifest:
    """The manifest of this key, or of the snapshot with this digest.

    Raises:
        DatasetError: if it is not there, naming those that are.
    """
    if snapshot.is_digest(key):
        return snapshot.index(key).manifest
    manifests.parse_key(key)
    found = catalog.find(paths.catalog_path(), key)
    if found is None:
        raise DatasetError(catalog.not_found(key, paths.catalog_path()))
    return found


def provenance(key: str) -> list[dict[str, Any]]:
    """The files that a dataset was ingested from; none for a seed, a build or a digest."""
    return [] if snapshot.is_digest(key) else catalog.provenance(paths.catalog_path(), key)


def verify(key: str) -> Report:
    """Compare the catalog, and the snapshot if there is one, with the manifest of `key`.

    A digest names a snapshot, which is then all that is looked at.
    """
    manifest = get(key)
    if snapshot.is_digest(key):
        return Report([], [], [], [], [], [], snapshot.damage(key))
    files_drifted = snapshot.drifted(manifest.digest)
    known = snapshot.members(manifest.digest) if snapshot.exists(manifest.digest) else None
    report = catalog.verify(paths.catalog_path(), key, known)
    if files_drifted and not report.snapshot_drift:
        report.notes.append(f"snapshot drift: {', '.join(files_drifted)}")
    return report


def ready(key: str, announce: Callable[[str], None]) -> Manifest:
    """What a run calls first: the dataset is there, is verified, and has a snapshot.

    A key that is not in the catalog and names a built-in seed is seeded, and said so. A digest
    names a snapshot, and needs no catalog.

    Raises:
        DatasetError: if there is no such dataset.
        Refused: if the catalog, or the snapshot, does not hold what the manifest says.
    """
    if snapshot.is_digest(key):
        if damage := snapshot.damage(key):
            raise IntegrityError(f"the snapshot {key[:12]} is damaged: {'; '.join(damage)}")
        return snapshot.index(key).manifest
    manifests.parse_key(key)
    if catalog.find(paths.catalog_path(), key) is None and key in seeds.names():
        built = seed(key)
        announce(f"seeded {key}: {built.manifest.count} examples")
    manifest = get(key)
    report = verify(key)
    if not report.ok:
        raise Refused(
            f"dataset {key} is not what its manifest says: {report.summary()}."
            f" See `tunix-mlflow datasets verify {key}`"
        )
    snapshot.write(manifest, catalog.stream(paths.catalog_path(), key, asked=True))
    return manifest


def diff(before: str, after: str) -> catalog.Difference:
    """What sets two datasets apart."""
    get(before), get(after)
    return catalog.diff(paths.catalog_path(), before, after)


def check_leakage(
    trained: Manifest, train_split: str, evaluated: Manifest, split: str | None
) -> Leakage:
    """Look for an evaluation split in a training split; both have snapshots.

    Raises:
        DatasetError: if there is no such split.
    """
    for manifest, name in ((trained, train_split), (evaluated, split)):
        if name is not None and name not in manifest.splits:
            raise DatasetError(
                f"dataset {manifest.key} has no split {name!r}; it has {', '.join(manifest.splits)}"
            )
    return snapshot.leak(trained.digest, train_split, evaluated.digest, split)


def sample(manifest: Manifest, count: int, *, number: int, split: str | None) -> list[Example]:
    """Examples drawn at random, the same for the same `number`."""
    found = snapshot.read(manifest.digest, split)
    return random.Random(number).sample(found, min(count, len(found)))


def export(key: str, path: Path, form: str = "trace") -> int:
    """Write the dataset in ingest order; the file appears whole or not at all.

    Args:
        key: the dataset.
        path: ends in .jsonl, .jsonl.gz or .parquet.
        form: one of formats.EXPORTS.

    Returns:
        The number of examples.

    Raises:
        DatasetError: when the file cannot be written, or an example does not fit the form.
        IntegrityError: when an example is not what its digest says.
    """
    if form not in formats.EXPORTS:
        raise DatasetError(f"no format {form!r}; one of {', '.join(formats.EXPORTS)}")
    manifest = get(key)
    stored, record = catalog.stream(paths.catalog_path(), key), formats.writer(form)
    count = 0
    with contextlib.closing(stored), _whole(path) as part, _writer(part, path.name) as write:
        for batch in stored:
            if wrong := catalog.find_corrupted(batch):
                raise IntegrityError(
                    f"{canonical.id_of(wrong[0])} is not what its digest says; see"
                    f" `tunix-mlflow datasets verify {key}`"
                )
            texts = batch["canonical"].cast(pa.binary()).to_pylist()
            splits = batch["split"].to_pylist()
            write([record(t, s) for t, s in zip(texts, splits, strict=True)])
            count += len(texts)
        if count != manifest.count:
            raise IntegrityError(
                f"dataset {key} is damaged; see `tunix-mlflow datasets verify {key}`"
            )
    return count


def leftovers() -> list[tuple[Path, int]]:
    """Stages and half-made snapshots that a killed process left, with their bytes."""
    found = []
    roots = [paths.temporary_dir(), paths.snapshot_dir("0" * 64).parent]
    for root in roots:
        for path in [*root.glob("stage-*-*"), *root.glob(".making-*")]:
            owner = path.name.removeprefix(".making").removeprefix("stage").split("-")[1]
            if not _alive(owner) or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                found.append((path, size))
    return found


def _alive(owner: str) -> bool:
    try:
        os.kill(int(owner), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _snapshot_if_small(manifest: Manifest) -> None:
    if manifest.count <= SMALL and not snapshot.exists(manifest.digest):
        stored = catalog.stream(paths.catalog_path(), manifest.key, asked=True)
        snapshot.write(manifest, stored)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, or is gone."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writer(part: Path, name: str) -> Iterator[Callable[[list[Any]], None]]:
    if name.endswith(".parquet"):
        rows: list[Any] = []
        yield rows.extend
        try:
            table = pa.Table.from_pylist(_columns(msgspec.json.decode(msgspec.json.encode(rows))))
        except pa.ArrowException as error:
            raise DatasetError(f"the meta of these examples has no columns: {error}") from error
        pq.write_table(table, part, compression="zstd")
        return
    encoder = msgspec.json.Encoder()
    pending: Future[Any] | None = None

    def write(records: list[Any]) -> None:
        nonlocal pending
        data = encoder.encode_lines(records)
        if pending is not None:
            pending.result()
        pending = behind.submit(out.write, data)  # while the next are made

    with (
        gzip.open(part, "wb") if name.endswith(".gz") else part.open("wb") as out,
        ThreadPoolExecutor(1) as behind,
    ):
        yield write
        if pending is not None:
            pending.result()


def _columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Parquet has no empty struct.
    return [{k: v for k, v in row.items() if v != {}} for row in rows]
