"""The operations on datasets, as the command line and the pipelines use them."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import export as exports
from tunix_mlflow.data import formats, parsing, seeds, shared_keys, snapshot, staging
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog import diff as catalog_diff
from tunix_mlflow.data.catalog import read, store
from tunix_mlflow.data.catalog import verify as catalog_verify
from tunix_mlflow.data.catalog.verify import Report
from tunix_mlflow.data.examples import Example, from_canonical
from tunix_mlflow.data.leakage import Leakage
from tunix_mlflow.data.manifest import Manifest, Selection
from tunix_mlflow.data.sources import find_sources
from tunix_mlflow.errors import DatasetError, IntegrityError, Refused

SMALL = 100_000
"""Examples up to which a dataset gets its snapshot at once; a larger one when first used."""


class Built(NamedTuple):
    """A manifest, and whether this call created it (False: the same one was stored)."""

    manifest: Manifest
    created: bool


class LocalFiles(NamedTuple):
    """Arguments of an ingest, all of which are here."""

    names: list[str]  # paths and SPLIT=PATH
    origins: dict[str, str]  # file or folder -> the URI that it was read from


class Ingested(NamedTuple):
    """The result of an ingest."""

    manifest: Manifest
    created: bool
    form: str
    rows: int
    duplicates: int
    rejected: int
    unused: dict[str, int]  # column -> characters of its long texts, which became meta

    @property
    def validation_from_train(self) -> int:
        """Examples that went from train to validation, since the data has no validation split."""
        return int(self.manifest.stats.get("validation_from_train", 0))


def load_dataset(
    source: str | Path | Sequence[str | Path], key: str | None = None, **options: Any
) -> Manifest:
    """Return a verified dataset that has a snapshot. Prints nothing.

    For example::

        manifest = tunix_mlflow.load_dataset("golden-v2")
        manifest = tunix_mlflow.load_dataset("support.jsonl", key="support-v1")
        manifest = tunix_mlflow.load_dataset(
            ["train=a.jsonl", "test=b.jsonl"], key="support-v2", form="messages"
        )

    Args:
        source: without `key` a dataset key or digest; a built-in seed is seeded if necessary.
            With `key` one or more paths of files or folders, or SPLIT=PATH.
        key: NAME-vN, under which the files are stored. Storing the same content again changes
            nothing.
        options: of :func:`ingest`, with `key`.

    Raises:
        DatasetError: if there is no such dataset, or a row of the files is wrong.
        Refused: if what is stored does not match the manifest.
    """
    if key is None:
        if not isinstance(source, str):
            raise DatasetError(
                f"load_dataset({source!r}): give key=NAME-vN to ingest files, or a dataset key"
            )
        if options:
            raise DatasetError(f"load_dataset: {', '.join(sorted(options))} need key=NAME-vN")
        return ready(source)
    named = [source] if isinstance(source, str | Path) else list(source)
    return ready(ingest([str(path) for path in named], key, **options).manifest.key)


def seed(
    key: str,
    *,
    num_traces: int | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Built:
    """Generate a dataset into the catalog; generating the same one again changes nothing.

    Args:
        key: of the seed; also of the dataset, unless `name` is given.
        num_traces: how many; None for the seed's default.
        seed: the random seed; None for 42.
        name: the key to store the dataset under.

    Raises:
        DatasetError: for an unknown seed, a count it refuses, or a key that is taken.
    """
    generator = seeds.find(key)
    if generator is None:
        raise DatasetError(
            f"there is no seed {key!r}; there are: {', '.join(seeds.names())}, {seeds.GYM}FAMILY"
        )
    stored_as = name or seeds.dataset_key(key)
    manifests.parse_key(stored_as)
    count = generator.default_traces if num_traces is None else num_traces
    seed = seeds.DEFAULT_SEED if seed is None else seed
    request = {
        "generator": key,
        "seed": seed,
        "num_traces": count,
        "splits": dict(manifests.HELD_OUT),
    }
    with staging.new_stage() as stage:
        stage.add_all(seeds.examples(generator, seed=seed, count=count))
        built = Built(
            *store.ingest(paths.catalog_path(), stage, stored_as, request, [], shared_keys.claim)
        )
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
    encoding: str | None = None,
    origins: Mapping[str, str] | None = None,
    skip_bad: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ingested:
    """Store the examples of files as a dataset: all of them, or none.

    Args:
        named: paths of files or folders, or SPLIT=PATH.
        key: of the dataset.
        form: one of formats.FORMATS, or auto.
        mapping: field -> the column it is in, or a text with columns; see column_map.
        splits: shares of the prompts, used if the data has no splits; None: a tenth each for
            validation and test, and at least one prompt. Of data with splits, but without
            validation, the share of validation is taken from the train prompts, and the manifest's
            statistics have `validation_from_train`.
        limits: maximum lengths; None for the defaults.
        encoding: of text files; None: UTF-8.
        origins: file or folder -> the URI that it was read from, for the provenance.
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
    shares = dict(manifests.HELD_OUT if splits is None else splits)
    manifests.bounds(shares)
    arguments = [str(named)] if isinstance(named, Path) else list(named)
    sources = find_sources(arguments, encoding)
    path = paths.catalog_path()
    with staging.new_stage() as stage:
        parsed = parsing.read_files(
            stage,
            sources,
            form=form,
            mapping=mapping,
            limits=limits or LimitsConfig(),
            skip_bad=skip_bad is not None,
            progress=progress,
        )
        if not stage.rows:
            raise DatasetError(
                f"{', '.join(arguments)} holds no {parsed.form} rows that can be used"
            )
        rejects = list(parsed.rejects)
        if skip_bad is not None:
            conflicts = store.conflicts(path, stage)
            rejects += [
                parsing.Reject(
                    f"{sources[c.source].path}:{c.number}",
                    f"its prompt is in another split than {c.split!r} too",
                    c.canonical[:2_000],
                )
                for c in conflicts
            ]
            stage = stage.without({c.digest for c in conflicts}) if conflicts else stage
        request: dict[str, Any] = {"ingest": parsed.form, "splits": shares}
        if splits is None:
            request["at_least_one"] = True
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"ingested_at": now, "version": importlib.metadata.version("tunix-mlflow")}
        provenance = [
            {**read, **about, **_origin(source.path, origins or {})}
            for source, read in zip(sources, parsed.sources, strict=True)
        ]
        manifest, created = store.ingest(path, stage, key, request, provenance, shared_keys.claim)
        duplicates = stage.rows - manifest.count
        rows = sum(source["rows"] for source in parsed.sources)
    if skip_bad is not None:
        with exports.writing(skip_bad) as part, part.open("w", encoding="utf-8") as out:
            parsing.write_rejects(out, rejects)
    _snapshot_if_small(manifest)
    return Ingested(manifest, created, parsed.form, rows, duplicates, len(rejects), parsed.unused)


def _origin(path: Path, origins: Mapping[str, str]) -> dict[str, str]:
    """Return the URI that a file came from, as a part of its provenance."""
    found = [uri for place, uri in origins.items() if path.is_relative_to(place)]
    return {"origin": found[0]} if found else {}


def build(key: str, selection: Selection) -> Built:
    """Make a dataset of examples that are in the catalog.

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
    built = Built(*store.build(paths.catalog_path(), key, selection, shared_keys.claim))
    _snapshot_if_small(built.manifest)
    return built


def get(key: str) -> Manifest:
    """Return the manifest of a key, or of the snapshot with a digest.

    A key that is not in the catalog may be a colleague's; see shared_keys.

    Raises:
        DatasetError: if there is none, naming those that there are.
    """
    if snapshot.is_digest(key):
        return snapshot.index(key).manifest
    manifests.parse_key(key)
    manifest = read.find(paths.catalog_path(), key)
    if manifest is None and (digest := shared_keys.find(key)) is not None:
        manifest = msgspec.structs.replace(snapshot.index(digest).manifest, key=key)
    if manifest is None:
        raise DatasetError(read.not_found(key, paths.catalog_path()))
    return manifest


def first_example(key: str) -> Example:
    """Return the first example of a dataset in the catalog."""
    return from_canonical(read.first(paths.catalog_path(), key))


def provenance(key: str) -> list[dict[str, Any]]:
    """Return the files that a dataset was ingested from; none for a seed, build or digest."""
    return [] if snapshot.is_digest(key) else read.provenance(paths.catalog_path(), key)


def verify(key: str) -> Report:
    """Compare the catalog, and the snapshot if there is one, with the manifest of `key`.

    Of a digest only the snapshot is verified.
    """
    manifest = get(key)
    if snapshot.is_digest(key):
        return Report([], [], [], [], [], [], snapshot.damage(key))
    changed_files = snapshot.changed_files(manifest.digest)
    known = snapshot.members(manifest.digest) if snapshot.exists(manifest.digest) else None
    report = catalog_verify.verify(paths.catalog_path(), key, known)
    if changed_files and not report.snapshot_drift:
        report.notes.append(f"snapshot drift: {', '.join(changed_files)}")
    return report


def ready(key: str, announce: Callable[[str], None] = lambda message: None) -> Manifest:
    """Return a dataset after verifying it; it has a snapshot then.

    A seed that is not in the catalog yet is seeded, and `announce` is called with a message. A
    digest names a snapshot, and needs no catalog.

    Raises:
        DatasetError: if there is no such dataset.
        Refused: if the catalog, or the snapshot, does not match the manifest.
    """
    if snapshot.is_digest(key):
        if damage := snapshot.damage(key):
            raise IntegrityError(f"the snapshot {key[:12]} is damaged: {'; '.join(damage)}")
        return snapshot.index(key).manifest
    manifests.parse_key(key)
    if read.find(paths.catalog_path(), key) is None:
        if (digest := shared_keys.find(key)) is not None:
            announce(f"dataset {key} is {digest[:16]} of {paths.snapshot_root()}")
            return msgspec.structs.replace(ready(digest, announce), key=key)
        if key in seeds.names():
            built = seed(key)
            announce(f"seeded {key}: {built.manifest.count} examples")
    manifest = get(key)
    shared_keys.claim(manifest)
    report = verify(key)
    if not report.ok:
        raise Refused(
            f"dataset {key} does not match its manifest: {report.summary()}."
            f" See `tunix-mlflow datasets verify {key}`"
        )
    snapshot.write(manifest, read.stream(paths.catalog_path(), key, prompt_text=True))
    return manifest


def diff(before: str, after: str) -> catalog_diff.Difference:
    """Return how two datasets differ."""
    get(before), get(after)
    return catalog_diff.diff(paths.catalog_path(), before, after)


def check_leakage(
    trained: Manifest, train_split: str, evaluated: Manifest, split: str | None
) -> Leakage:
    """Look for the prompts of an evaluation split in a training split, by their snapshots.

    Raises:
        DatasetError: if there is no such split.
    """
    for manifest, name in ((trained, train_split), (evaluated, split)):
        if name is not None and name not in manifest.splits:
            raise DatasetError(
                f"dataset {manifest.key} has no split {name!r}; it has {', '.join(manifest.splits)}"
            )
    return snapshot.leak(trained.digest, train_split, evaluated.digest, split)


def sample(manifest: Manifest, count: int, *, seed: int, split: str | None) -> list[Example]:
    """Return examples drawn at random, the same for the same seed."""
    examples = snapshot.read(manifest.digest, split)
    return random.Random(seed).sample(examples, min(count, len(examples)))


def export(key: str, path: Path, form: str = "trace") -> int:
    """Write a dataset to a file, as :func:`export.export`; return the number of examples."""
    return exports.export(get(key), path, form)


def leftovers() -> list[tuple[Path, int]]:
    """Return stages and incomplete snapshots that killed processes left, with their bytes."""
    roots = [paths.temporary_dir(), paths.snapshot_dir("0" * 64).parent]
    return [(path, files.size_of(path)) for root in roots for path in files.leftovers(root)]


def _snapshot_if_small(manifest: Manifest) -> None:
    if manifest.count <= SMALL and not snapshot.exists(manifest.digest):
        batches = read.stream(paths.catalog_path(), manifest.key, prompt_text=True)
        snapshot.write(manifest, batches)
