"""Files that can be ingested, from what a hub has and from MLflow's traces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.data.datasets import LocalFiles
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.models.hub import download
from tunix_mlflow.runtime.report import Reporter
from tunix_mlflow.tracking import store, traces

SCHEMES = (traces.SCHEME, download.SCHEME)


@contextmanager
def as_files(named: Sequence[str], reporter: Reporter) -> Iterator[LocalFiles]:
    """Yield names of files, with one of a file or folder in place of each URI.

    What traces are read into is below the state root, for the length of the block.

    Args:
        named: paths, `hf://datasets/OWNER/NAME@REVISION` (see models.hub.download), and
            `traces:/EXPERIMENT?filter=...` (see tracking.traces); each also as SPLIT=...
        reporter: is told how many traces were read, and why others were not.

    Raises:
        DatasetError: if a URI has nothing that can be used.
        TrackingError, UnavailableError: if it cannot be read.
    """
    names: list[str] = []
    origins: dict[str, str] = {}
    with store.restored(), files.scratch(paths.temporary_dir()) as scratch:
        for number, word in enumerate(named):
            split, uri = _parted(word)
            if uri is None:
                names.append(word)
                continue
            if uri.startswith(traces.SCHEME):
                path = _write(scratch / f"traces-{number}.jsonl", _traces(uri, reporter))
            else:
                path, uri = download.download(uri)
                reporter.info(f"{uri} is in {path}")
            names.append(f"{split}{path}")
            origins[str(path)] = uri
        yield LocalFiles(names, origins)


def _parted(word: str) -> tuple[str, str | None]:
    """Return SPLIT= and a URI; None: it is a path."""
    for scheme in SCHEMES:
        split, found, rest = word.partition(scheme)
        if found and (not split or split.endswith("=")):
            return split, scheme + rest
    return "", None


def _traces(uri: str, reporter: Reporter) -> list[dict[str, object]]:
    read = traces.read(store.connect(TrackingConfig()), uri)
    for reason, count in read.left_out.items():
        reporter.info(f"{uri}: {count:,} traces are left out: {reason}")
    if not read.rows:
        raise DatasetError(f"{uri} has no trace that can be used")
    reporter.info(f"{uri}: {len(read.rows):,} traces")
    return read.rows


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
