"""Files -> checked examples -> a stage on the disk, which the catalog then takes in at once.

The catalog is not held while files are parsed. A stage that is left behind by a kill is a file
in the temporary folder and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import pyarrow as pa

from tunix_mlflow import state
from tunix_mlflow.config import LimitsConfig
from tunix_mlflow.data import canonical, files, formats
from tunix_mlflow.data.examples import Example, canonical_bytes
from tunix_mlflow.data.files import Raw, Source
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
_MOST_BAD = 20  # named before a strict ingest stops looking


class Reject(NamedTuple):
    """A row that was left out."""

    where: str  # file:line
    reason: str
    row: str  # as it came, cut at 2,000 characters


class Stage:
    """Examples on the disk, in order of arrival, not yet in the catalog."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._held: list[bytes] = []
        self._digests: list[str] = []
        self._sources: list[int] = []
        self._numbers: list[int] = []

    def add(self, example: Example, source: int = 0, number: int = 0) -> None:
        """Take one more.

        Raises:
            ValueError: when it has no canonical form.
        """
        data = canonical_bytes(example)
        self._add(data, hashlib.sha256(data).hexdigest(), source, number)

    def _add(self, data: bytes, digest: str, source: int, number: int) -> None:
        self._held.append(data)
        self._digests.append(digest)
        self._sources.append(source)
        self._numbers.append(number)
        if len(self._held) == _BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is held, and end the file."""
        self._flush()
        self._writer.close()
        self._file.close()

    def batches(self) -> pa.RecordBatchReader:
        """All rows, streamed."""
        return pa.RecordBatchReader.from_batches(SCHEMA, self._read())

    def without(self, digests: set[str]) -> Stage:
        """Another stage, beside this one, that lacks some examples."""
        made = Stage(self.path.with_name("kept.arrow"))
        for batch in self.batches():
            columns = (batch["canonical"].cast(pa.binary()), batch["source"], batch["number"])
            values = zip(
                batch["digest"].to_pylist(), *(c.to_pylist() for c in columns), strict=True
            )
            for digest, text, source, number in values:
                if digest not in digests:
                    made._add(text, digest, source, number)
        made.close()
        return made

    def _read(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self.path)) as file:
            yield from pa.ipc.open_stream(file)

    def _flush(self) -> None:
        if not self._held:
            return
        count = len(self._held)
        self._writer.write_batch(
            pa.record_batch(
                [
                    pa.array(range(self.rows, self.rows + count), pa.int64()),
                    pa.array(self._sources, pa.int32()),
                    pa.array(self._numbers, pa.int64()),
                    pa.array(self._digests, pa.string()),
                    pa.array(self._held, pa.binary()).cast(pa.string()),
                ],
                schema=SCHEMA,
            )
        )
        self.rows += count
        for column in (self._held, self._digests, self._sources, self._numbers):
            column.clear()


class Parsed(NamedTuple):
    """What was read of a set of files."""

    stage: Stage
    form: str
    sources: list[dict[str, Any]]  # provenance: name, sha256, bytes, rows, rejected, split
    rejects: list[Reject]


@contextmanager
def new_stage() -> Iterator[Stage]:
    """A new stage, gone afterwards.

    Raises:
        DatasetError: when the state root cannot be written to.
    """
    folder = state.temporary_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f"stage-{os.getpid()}-", dir=folder)
    except OSError as error:
        raise DatasetError(f"cannot write below {folder}: {error.strerror}") from error
    try:
        yield Stage(Path(made) / "stage.arrow")
    except OSError as error:
        raise DatasetError(f"cannot write below {folder}: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def of_examples(stage: Stage, found: Iterable[Example]) -> None:
    """Stage what a program made.

    Raises:
        DatasetError: when an example has no canonical form.
    """
    try:
        for number, example in enumerate(found, start=1):
            stage.add(example, 0, number)
    except ValueError as error:
        raise DatasetError(f"an example cannot be stored: {error}") from error
    stage.close()


def of_files(
    stage: Stage,
    named: list[Source],
    *,
    form: str,
    mapping: Mapping[str, str],
    limits: LimitsConfig,
    skip_bad: bool,
    progress: Callable[[int, int], None],
) -> Parsed:
    """Stage the rows of files.

    Args:
        stage: where they go.
        named: the files.
        form: a format, or `auto`.
        mapping: field -> column.
        limits: lengths that are taken.
        skip_bad: leave bad rows out, and return them; else they are an error.
        progress: called with bytes done and bytes in all.

    Raises:
        DatasetError: naming the bad lines, or the file that cannot be read.
    """
    columns = files.columns(named[0], limits.body_bytes) if named else {}
    if mapping or form == "auto":
        missing = [column for column in mapping.values() if column not in columns]
        if missing and columns:
            raise DatasetError(
                f"{named[0].path} has no column {missing[0]!r}; it has {', '.join(columns)[:300]}"
            )
    if form == "auto":
        renamed = {column: field for field, column in mapping.items()}
        names = [renamed.get(column, column) for column, filled in columns.items() if filled]
        form = formats.recognise(names) if names else "trace"  # whose errors then say it
    total, done = sum(files.size(source) for source in named), 0
    provenance, rejects = [], []
    for index, source in enumerate(named):
        parse = _parser(source, form, mapping, limits)
        rows = bad = 0
        size, start = files.size(source), done
        for raw in files.rows(source, limits.body_bytes):
            rows += 1
            try:
                stage.add(parse(raw), index, raw.number)
            except (ValueError, RecursionError) as error:
                bad += 1
                rejects.append(_reject(source, raw, error, form))
                if not skip_bad and len(rejects) >= _MOST_BAD:
                    raise _refusal(rejects, more=True) from error
            if raw.line is not None:
                done += len(raw.line)
            if rows % 20_000 == 0:
                progress(min(done, start + size), total)
        done = start + size
        progress(done, total)
        provenance.append(
            {
                "file": source.path.name,
                "sha256": files.digest(source),
                "bytes": size,
                "rows": rows,
                "rejected": bad,
                "split": source.split,
            }
        )
    if rejects and not skip_bad:
        raise _refusal(rejects, more=False)
    stage.close()
    return Parsed(stage, form, provenance, rejects)


def write_rejects(out: IO[str], rejects: Iterable[Reject]) -> None:
    """One JSON object a line: where, reason, row."""
    for reject in rejects:
        out.write(json.dumps(reject._asdict(), ensure_ascii=True) + "\n")


def _parser(
    source: Source, form: str, mapping: Mapping[str, str], limits: LimitsConfig
) -> Callable[[Raw], Example]:
    read = formats.reader(form, limits, mapping, source.split)
    fast = formats.trace_decoder(limits) if form == "trace" and not mapping else None

    def checked(line: bytes) -> None:
        if len(line) - line.endswith(b"\n") > limits.body_bytes:
            raise ValueError(f"the line is longer than {limits.body_bytes} bytes")
        if line.startswith(b"\xef\xbb\xbf"):
            raise ValueError("starts with a byte-order mark; save the file without it")
        if not line.strip():
            raise ValueError("empty line; remove it")

    def parse(raw: Raw) -> Example:
        if raw.line is None:
            if len(msgspec.json.encode(raw.record, enc_hook=str)) > limits.body_bytes:
                raise ValueError(f"the row is longer than {limits.body_bytes} bytes as JSON")
            return read(raw.record or {})
        if fast is not None and len(raw.line) <= limits.body_bytes:
            try:
                trace = fast(raw.line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass  # the slow way says more
            else:
                if canonical.quotes(raw.line) == formats.trace_quotes(trace):
                    return formats.from_trace(trace, source.split)
        checked(raw.line)
        tree = canonical.parse(raw.line)
        if not isinstance(tree, dict):
            raise ValueError(f"Expected `object`, got {type(tree).__name__}")
        return read(tree)

    return parse


def _reject(source: Source, raw: Raw, error: Exception, form: str) -> Reject:
    reason = " ".join(str(error).split()) or type(error).__name__
    where = f"{source.path}:{raw.number}"
    what = "a reasoning trace" if form == "trace" else f"a row of {form}"
    row = raw.line.decode("utf-8", "replace") if raw.line is not None else str(raw.record)
    return Reject(where, f"not {what}: {reason}", row[:2_000])


def _refusal(rejects: list[Reject], *, more: bool) -> DatasetError:
    said = "; ".join(f"{r.where}: {r.reason[:300]}" for r in rejects[:5])
    count = len(rejects) - 5
    if count > 0 or more:
        said += f"; and {count} more" + (" so far" if more else "")
    plural = "them" if len(rejects) > 1 else "it"
    return DatasetError(f"{said}. Nothing was stored; mend {plural}, or give --skip-bad")
