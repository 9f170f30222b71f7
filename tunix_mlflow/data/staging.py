"""A stage: checked examples on the disk, which the catalog then takes in at once.

The catalog is not held while files are parsed. A stage that is left behind by a kill is a folder
among the temporary ones and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunix_mlflow import paths
from tunix_mlflow.data.examples import Example, canonical_bytes
from tunix_mlflow.errors import DatasetError

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # order of arrival, from 0
        ("source", pa.int32()),  # index of the file
        ("number", pa.int64()),  # line or row, from 1
        ("digest", pa.string()),
        ("canonical", pa.string()),
    ]
)
_BATCH = 10_000


class Part:
    """A file of examples of one source, in order of arrival.

    Positions and lines are counted within it.
    """

    def __init__(self, path: Path, source: int = 0) -> None:
        self.path, self.source = path, source
        self.rows = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._held: list[bytes] = []
        self._numbers: list[int] = []

    def add(self, data: bytes, number: int) -> None:
        """Take one more: its canonical bytes, and the line that it comes from."""
        self._held.append(data)
        self._numbers.append(number)
        if len(self._held) == _BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is held, and end the file."""
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        count = len(self._held)
        if not count:
            return
        digests = [hashlib.sha256(data).hexdigest() for data in self._held]
        columns = [
            pa.array(np.arange(self.rows, self.rows + count)),
            pa.array(np.full(count, self.source, np.int32)),
            pa.array(np.array(self._numbers, np.int64)),
            pa.array(digests, pa.string()),
            pa.array(self._held, pa.binary()).cast(pa.string()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self.rows += count
        self._held.clear()
        self._numbers.clear()


class Stage:
    """Parts, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self._parts: list[tuple[Path, int, int]] = []  # with first position and line before

    def new_part(self) -> Path:
        """A path for one more part."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "part.arrow"

    def append(self, path: Path, rows: int, lines_before: int = 0) -> None:
        """Take a finished part; its lines are numbered from `lines_before`."""
        self._parts.append((path, self.rows, lines_before))
        self.rows += rows

    def add_all(self, found: Iterable[Example]) -> None:
        """Take what a program made.

        Raises:
            DatasetError: when an example has no canonical form.
        """
        part = Part(self.new_part())
        try:
            for number, example in enumerate(found, start=1):
                part.add(canonical_bytes(example), number)
        except ValueError as error:
            raise DatasetError(f"an example cannot be stored: {error}") from error
        part.close()
        self.append(part.path, part.rows)

    def batches(self) -> pa.RecordBatchReader:
        """All rows, streamed."""
        return pa.RecordBatchReader.from_batches(SCHEMA, self._read())

    def without(self, digests: set[str]) -> Stage:
        """Another stage, beside this one, that lacks some examples; it knows no lines."""
        part = Part(self.new_part())
        for batch in self.batches():
            texts = batch["canonical"].cast(pa.binary()).to_pylist()
            for digest, text in zip(batch["digest"].to_pylist(), texts, strict=True):
                if digest not in digests:
                    part.add(text, 0)
        part.close()
        made = Stage(self.folder)
        made.append(part.path, part.rows)
        return made

    def _read(self) -> Iterator[pa.RecordBatch]:
        for path, position, lines in self._parts:
            with pa.OSFile(str(path)) as file:
                for batch in pa.ipc.open_stream(file):
                    moved = batch.set_column(0, "position", pc.add(batch["position"], position))
                    yield moved.set_column(2, "number", pc.add(batch["number"], lines))


@contextmanager
def new_stage() -> Iterator[Stage]:
    """A new stage, gone afterwards.

    Raises:
        DatasetError: when the state root cannot be written to.
    """
    folder = paths.temporary_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f"stage-{os.getpid()}-", dir=folder)
    except OSError as error:
        raise DatasetError(f"cannot write below {folder}: {error.strerror}") from error
    try:
        yield Stage(Path(made))
    except OSError as error:
        raise DatasetError(f"cannot write below {folder}: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
