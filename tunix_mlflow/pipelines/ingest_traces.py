"""Read MLflow's traces into files that can be ingested."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import TrackingConfig
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.runtime.report import Reporter
from tunix_mlflow.tracking import store, traces

_LONGEST = 180  # characters of a file's name


@contextmanager
def as_files(named: Sequence[str], reporter: Reporter) -> Iterator[list[str]]:
    """Yield names of files, with a JSONL file in place of each `traces:/` URI.

    The files are below the state root, for the length of the block. Their names are those of the
    URIs, which the dataset's provenance then has.

    Args:
        named: paths, and `traces:/EXPERIMENT?filter=...` (see tracking.traces), also as SPLIT=...
        reporter: is told how many traces were read, and why others were not.

    Raises:
        DatasetError: if a URI has no trace that can be used.
        TrackingError, UnavailableError: if they cannot be read.
    """
    with store.restored(), files.scratch(paths.temporary_dir()) as scratch:
        client = store.connect(TrackingConfig())
        names = []
        for word in named:
            split, scheme, rest = word.partition(traces.SCHEME)
            if not scheme or (split and not split.endswith("=")):
                names.append(word)
                continue
            uri = scheme + rest
            read = traces.read(client, uri)
            for reason, count in read.left_out.items():
                reporter.info(f"{uri}: {count:,} traces are left out: {reason}")
            if not read.rows:
                raise DatasetError(f"{uri} has no trace that can be used")
            reporter.info(f"{uri}: {len(read.rows):,} traces")
            path = scratch / f"{quote(uri, safe='')[:_LONGEST]}.jsonl"
            names.append(f"{split}{_write(path, read.rows)}")
        yield names


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
