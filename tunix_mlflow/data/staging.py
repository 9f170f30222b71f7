"""A stage: checked examples on the disk, which the catalog then stores at once.

The catalog is not open while files are parsed. A stage that a killed process leaves behind is a
temporary folder and nothing else.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunix_mlflow import files, paths
from tunix_mlflow.data.examples import Example, canonical_bytes
from tunix_mlflow.errors import DatasetError, UnavailableError

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
        self._buffer: list[bytes] = []
        self._numbers: list[int] = []

    def add(self, data: bytes, number: int) -> None:
        """Append an example: its canonical bytes, and the line it is from."""
        self._buffer.append(data)
        self._numbers.append(number)
        if len(self._buffer) == _BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is buffered, and end the file."""
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        count = len(self._buffer)
        if not count:
            return
        digests = [hashlib.sha256(data).hexdigest() for data in self._buffer]
        columns = [
            pa.array(np.arange(self.rows, self.rows + count)),
            pa.array(np.full(count, self.source, np.int32)),
            pa.array(np.array(self._numbers, np.int64)),
            pa.array(digests, pa.string()),
            pa.array(self._buffer, pa.binary()).cast(pa.string()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self.rows += count
        self._buffer.clear()
        self._numbers.clear()


class Stage:
    """A sequence of parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self._parts: list[tuple[Path, int, int]] = []  # with first position and line before

    def new_part(self) -> Path:
        """Return the path of a new part."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "part.arrow"

    def append(self, path: Path, rows: int, lines_before: int = 0) -> None:
        """Append a finished part; its lines are numbered from `lines_before`."""
        self._parts.append((path, self.rows, lines_before))
        self.rows += rows

    def add_all(self, examples: Iterable[Example]) -> None:
        """Append examples that a program made.

        Raises:
            DatasetError: if an example has no canonical form.
        """
        part = Part(self.new_part())
        try:
            for number, example in enumerate(examples, start=1):
                part.add(canonical_bytes(example), number)
        except ValueError as error:
            raise DatasetError(f"an example cannot be stored: {error}") from error
        part.close()
        self.append(part.path, part.rows)

    def batches(self) -> pa.RecordBatchReader:
        """Return all rows, streamed."""
        return pa.RecordBatchReader.from_batches(SCHEMA, self._read())

    def without(self, digests: set[str]) -> Stage:
        """Return another stage without some examples; its line numbers are 0."""
        part = Part(self.new_part())
        for batch in self.batches():
            texts = batch["canonical"].cast(pa.binary()).to_pylist()
            for digest, text in zip(batch["digest"].to_pylist(), texts, strict=True):
                if digest not in digests:
                    part.add(text, 0)
        part.close()
        stage = Stage(self.folder)
        stage.append(part.path, part.rows)
        return stage

    def _read(self) -> Iterator[pa.RecordBatch]:
        for path, position, lines in self._parts:
            with pa.OSFile(str(path)) as file:
                for batch in pa.ipc.open_stream(file):
                    moved = batch.set_column(0, "position", pc.add(batch["position"], position))
                    yield moved.set_column(2, "number", pc.add(batch["number"], lines))


@contextmanager
def new_stage() -> Iterator[Stage]:
    """Yield a new stage, and delete it afterwards.

    Raises:
        UnavailableError: if the state root cannot be written to.
    """
    folder = paths.temporary_dir()
    try:
        with files.scratch(folder) as stage:
            yield Stage(stage)
    except OSError as error:
        raise UnavailableError(f"cannot write below {folder}: {error}") from error
