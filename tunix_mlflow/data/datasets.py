"""The operations on datasets, as the command line and the stages use them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tunix_mlflow import state
from tunix_mlflow.data import canonical, catalog, examples, seeds, snapshot
from tunix_mlflow.data import manifest as manifests
from tunix_mlflow.data.catalog import Report, Row
from tunix_mlflow.data.examples import Example
from tunix_mlflow.data.manifest import Candidate, Manifest, Selection
from tunix_mlflow.errors import DatasetError, Refused

TEST_FRACTION = 0.1


class Built(NamedTuple):
    """A manifest and whether this call made it (False: the same was there)."""

    manifest: Manifest
    created: bool


def seed(
    key: str,
    *,
    num_traces: int | None = None,
    number: int | None = None,
    name: str | None = None,
) -> Built:
    """Generate a built-in dataset into the catalog; the same one twice changes nothing.

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
        raise DatasetError(f"there is no seed {key!r}; built in: {', '.join(seeds.names())}")
    count = found.default_traces if num_traces is None else num_traces
    number = seeds.DEFAULT_SEED if number is None else number
    rows = [catalog.row_of(t.example()) for t in seeds.traces(found, number=number, count=count)]
    request = {
        "seed": key,
        "number": number,
        "num_traces": count,
        "test_fraction": TEST_FRACTION,
    }
    return _store(name or key, request, rows)


def ingest(path: Path, key: str, *, test_fraction: float = TEST_FRACTION) -> Built:
    """Store the traces of a JSONL file as a dataset: all of them, or none.

    Raises:
        DatasetError: naming the file and the line of the first bad trace.
    """
    manifests.parse_key(key)
    rows = [catalog.row_of(trace.example()) for trace in examples.read_traces(path)]
    if not rows:
        raise DatasetError(f"{path} holds no traces")
    content = canonical.set_digest("tunix-source-v1", (r.digest for r in rows))
    request = {"ingest": "jsonl", "content": content, "test_fraction": test_fraction}
    return _store(key, request, rows)


def build(key: str, selection: Selection) -> Built:
    """Make a dataset of examples that the catalog has.

    Raises:
        DatasetError: if nothing is selected, or the key is taken.
    """
    manifests.parse_key(key)
    rows = catalog.select(state.catalog_path(), selection)
    if not rows:
        raise DatasetError("no example in the catalog meets the request; loosen its filters")
    return _store(key, msgspec.to_builtins(selection), rows, new_examples=False)


def get(key: str) -> Manifest:
    """The manifest of this key.

    Raises:
        DatasetError: if it is not there, naming those that are.
    """
    manifests.parse_key(key)
    found = catalog.find(state.catalog_path(), key)
    if found is None:
        raise DatasetError(catalog.not_found(key, state.catalog_path()))
    return found


def verify(key: str) -> Report:
    """Compare the catalog with the manifest of `key`."""
    manifest = get(key)
    return catalog.verify(state.catalog_path(), key, snapshot.members(manifest.digest))


def ready(key: str, announce: Callable[[str], None]) -> Manifest:
    """What a run calls first: the dataset is there, is verified, and has a snapshot.

    A key that is not in the catalog and names a built-in seed is seeded, and said so.

    Raises:
        DatasetError: if there is no such dataset.
        Refused: if the catalog does not hold what the manifest says.
    """
    manifests.parse_key(key)
    if catalog.find(state.catalog_path(), key) is None and seeds.find(key) is not None:
        built = seed(key)
        announce(f"seeded {key}: {built.manifest.count} examples")
    manifest = get(key)
    report = verify(key)
    if not report.ok:
        raise Refused(
            f"dataset {key} is not what its manifest says: {report.summary()}."
            f" See `tunix-mlflow datasets verify {key}`"
        )
    snapshot.write(manifest, catalog.read(state.catalog_path(), key))
    return manifest


def export(key: str, path: Path) -> int:
    """Write the dataset as our JSONL; the file appears whole or not at all.

    Returns:
        The number of lines.
    """
    manifest = get(key)
    table = catalog.read(state.catalog_path(), key)
    lines = []
    for text in table["canonical"].to_pylist():
        lines.append(examples.to_trace_line(examples.from_canonical(text)) + b"\n")
    if len(lines) != manifest.count:
        raise Refused(f"dataset {key} is damaged; see `tunix-mlflow datasets verify {key}`")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            out.writelines(lines)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DatasetError(f"cannot write {path}: {error.strerror}") from error
    return len(lines)


def statistics(found: Sequence[Example], rows: Sequence[Row]) -> dict[str, Any]:
    """Figures that describe a dataset; flat, as MLflow's profile wants them."""
    steps = [len(e.steps) for e in found]
    answers = [len(e.answer or e.messages[-1].content) for e in found]
    return {
        "distinct_prompts": len({row.prompt_digest for row in rows}),
        "steps_mean": round(sum(steps) / len(steps), 3),
        "steps_max": max(steps),
        "prompt_characters_max": max(len(e.prompt) for e in found),
        "answer_characters_max": max(answers),
    }


def _store(
    key: str, request: dict[str, Any], rows: Sequence[Row], *, new_examples: bool = True
) -> Built:
    manifests.parse_key(key)
    unique = list({row.digest: row for row in rows}.values())
    members = manifests.assign_splits(
        [Candidate(r.digest, r.prompt_digest, r.split) for r in unique],
        float(request["test_fraction"]),
    )
    found = [examples.from_canonical(row.canonical) for row in unique]
    made = Manifest(
        key=key,
        digest=manifests.dataset_digest(members),
        count=len(members),
        splits=manifests.split_digests(members),
        request=request,
        stats=statistics(found, unique) | {"duplicates_dropped": len(rows) - len(unique)},
    )
    path = state.catalog_path()
    created = catalog.store(path, made, members, unique if new_examples else ())
    if created:
        snapshot.write(made, catalog.read(path, key))
    return Built(made if created else get(key), created)
