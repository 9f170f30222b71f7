"""Read files into checked examples in a stage, on all processors.

A large file of plain lines is cut into spans, and each is read by a process of its own:

    python -P -m tunix_mlflow.data.parsing      # a span on stdin, progress and outcome on stdout

The process ends when its pipe is closed, which it is when the parent dies.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
from msgspec import Struct

from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, formats, json_text, rows, sources
from tunix_mlflow.data.column_map import apply, columns_of
from tunix_mlflow.data.examples import Example, canonical_bytes
from tunix_mlflow.data.sources import Source
from tunix_mlflow.data.staging import Part, Stage
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.files import one_line, sha256_file

SPAN_BYTES = 32_000_000
"""Bytes of a file from which on another process is worth its start."""
_MAX_BAD = 20  # bad rows after which a strict ingest stops
_REPORT_ROWS = 20_000


class Reject(NamedTuple):
    """A row that was left out."""

    where: str  # file:line
    reason: str
    row: str  # as it was read, cut at 2,000 characters


class Parsed(NamedTuple):
    """The result of reading a set of files."""

    form: str
    sources: list[dict[str, Any]]  # provenance: name, sha256, bytes, rows, rejected, split
    rejects: list[Reject]
    unused: dict[str, int]  # column -> characters of its long texts, which became meta


class _Bad(Struct, frozen=True):
    number: int  # line, counted within the span
    reason: str
    row: str


class _Span(Struct, frozen=True):
    """A part of a file, and how it is read."""

    path: str
    kind: str
    codec: str | None
    encoding: str | None
    split: str | None
    start: int  # bytes; lines that begin at or after this position
    end: int | None  # and before this one; None: to the end
    form: str
    mapping: dict[str, str]
    limits: LimitsConfig
    skip_bad: bool
    index: int  # of the file
    part_path: str


class _Outcome(Struct, frozen=True):
    """The result of reading a span."""

    rows: int  # read
    kept: int
    bad: list[_Bad]
    stopped: bool  # after too many bad rows
    unused: dict[str, int] = {}  # column -> characters of its long texts, which became meta
    error: str | None = None  # why the file cannot be read


def read_files(
    stage: Stage,
    files: list[Source],
    *,
    form: str,
    mapping: Mapping[str, str],
    limits: LimitsConfig,
    skip_bad: bool,
    progress: Callable[[int, int], None],
) -> Parsed:
    """Read the rows of files into a stage.

    Args:
        stage: receives the examples.
        files: the files.
        form: a format, or `auto`.
        mapping: field -> column.
        limits: maximum lengths.
        skip_bad: leave bad rows out, and return them; otherwise they are an error.
        progress: called with bytes done and bytes in all.

    Raises:
        DatasetError: naming the bad lines, or the file that cannot be read.
    """
    files = [rows.with_layout(source) for source in files]
    row = rows.first(files[0], limits.body_bytes) if files else {}
    needed = [column for spec in mapping.values() for column in columns_of(spec, row)]
    missing = [column for column in needed if column not in row]
    if missing and row:
        raise DatasetError(
            f"{files[0].path} has no column {missing[0]!r}; it has {', '.join(row)[:300]}"
        )
    if form == "auto":
        named = apply(mapping, row)
        form = formats.recognise(named) if named else "trace"  # whose errors tell what is wrong
    total, done = sum(sources.size(source) for source in files), 0
    provenance: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    unused: Counter[str] = Counter()
    for index, source in enumerate(files):
        size, start = sources.size(source), done
        spans = [
            _Span(
                path=str(source.path.absolute()),
                kind=source.kind,
                codec=source.codec,
                encoding=source.encoding,
                split=source.split,
                start=begin,
                end=end,
                form=form,
                mapping=dict(mapping),
                limits=limits,
                skip_bad=skip_bad,
                index=index,
                part_path=str(stage.new_part()),
            )
            for begin, end in _cuts(source, size)
        ]
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(sha256_file, source.path)
            outcomes = _read(spans, functools.partial(_report, progress, start, size, total))
        lines = 0
        for span, outcome in zip(spans, outcomes, strict=True):
            if outcome.error is not None:
                raise DatasetError(outcome.error)
            rejects += [_reject(source, bad, lines, form) for bad in outcome.bad]
            if outcome.stopped:  # the lines after it were not all counted
                raise _refusal(rejects, more=True)
            stage.append(Path(span.part_path), outcome.kept, lines)
            lines += outcome.rows
            unused.update(outcome.unused)
        done = start + size
        progress(done, total)
        provenance.append(
            {
                "file": source.path.name,
                "sha256": digest.result(),
                "bytes": size,
                "rows": sum(outcome.kept + len(outcome.bad) for outcome in outcomes),
                "rejected": sum(len(outcome.bad) for outcome in outcomes),
                "split": source.split,
            }
        )
        if len(rejects) >= _MAX_BAD and not skip_bad:
            raise _refusal(rejects, more=index + 1 < len(files))
    if rejects and not skip_bad:
        raise _refusal(rejects, more=False)
    return Parsed(form, provenance, rejects, dict(unused))


def _report(
    progress: Callable[[int, int], None], start: int, size: int, total: int, more: int
) -> None:
    progress(start + min(more, size), total)  # unzipped it is more than the file


def write_rejects(out: IO[str], rejects: Iterable[Reject]) -> None:
    """Write one JSON object per line: where, reason, row."""
    for reject in rejects:
        out.write(json.dumps(reject._asdict(), ensure_ascii=True) + "\n")


def _cuts(source: Source, size: int) -> list[tuple[int, int | None]]:
    """Return spans of about equal size: one per processor if the file is large and plain lines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, size // SPAN_BYTES)
    is_plain = source.kind == "jsonl" and source.codec is None and source.encoding is None
    if not is_plain or count < 2:
        return [(0, None)]
    starts = [size * i // count for i in range(count)]
    return list(zip(starts, [*starts[1:], None], strict=True))


def _read(spans: list[_Span], progress: Callable[[int], None]) -> list[_Outcome]:
    """Read each span: a single one in this process, several in processes of their own."""
    if len(spans) == 1:
        return [_parse(spans[0], progress)]
    command = [sys.executable, "-P", "-m", __name__]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in spans
    ]
    done = [0] * len(spans)

    def follow(number: int) -> _Outcome:
        child = children[number]
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(msgspec.json.encode(spans[number]))
        child.stdin.close()
        for line in child.stdout:
            if line[:1] == b"{":
                return msgspec.json.decode(line, type=_Outcome)
            done[number] = int(line)
            progress(sum(done))
        raise RuntimeError(f"a process that read {spans[number].path} ended with {child.wait()}")

    try:
        with ThreadPoolExecutor(len(spans)) as threads:
            followed = [threads.submit(follow, number) for number in range(len(spans))]
            try:
                return [each.result() for each in followed]
            except BaseException:
                for child in children:
                    child.kill()
                raise
    finally:
        for child in children:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def _parse(span: _Span, progress: Callable[[int], None]) -> _Outcome:
    """Read one span into its part, calling `progress` with the bytes read."""
    source = Source(Path(span.path), span.kind, span.codec, span.split, span.encoding)
    part = Part(Path(span.part_path), span.index)
    bad: list[_Bad] = []
    number = done = 0
    is_json = span.kind in ("jsonl", "json")
    unused: dict[str, int] = {}
    parser = _line_parser if is_json else _record_parser
    parse: Callable[[Any], Example] = parser(span, unused)
    longest = span.limits.body_bytes
    found: Iterable[tuple[int, Any]]
    if span.kind == "jsonl":
        found = enumerate(rows.lines(source, longest, span.start, span.end), start=1)
    else:
        found = rows.rows(source, longest)
    for number, row in found:
        try:
            part.add(canonical_bytes(parse(row)), number)
        except (ValueError, RecursionError) as error:
            if is_json and row.isspace():
                continue
            bad.append(_bad(number, row, error))
            if not span.skip_bad and len(bad) >= _MAX_BAD:
                break
        if is_json:
            done += len(row)
            if number % _REPORT_ROWS == 0:
                progress(done)
    part.close()
    stopped = not span.skip_bad and len(bad) >= _MAX_BAD
    return _Outcome(number, part.rows, bad, stopped, unused)


def _record_parser(span: _Span, unused: dict[str, int]) -> Callable[[dict[str, Any]], Example]:
    read = formats.reader(
        span.form, span.limits, span.mapping, span.split, has_columns=True, unused=unused
    )
    is_table = span.kind in ("csv", "tsv")

    def parse(record: dict[str, Any]) -> Example:
        if is_table:
            record = {name: _cell(name, text) for name, text in record.items()}
        if len(msgspec.json.encode(record, enc_hook=str)) > span.limits.body_bytes:
            raise ValueError(f"the row is longer than {span.limits.body_bytes} bytes as JSON")
        return read(record)

    return parse


def _cell(name: str, text: Any) -> Any:
    """Return a list or an object that a cell has as JSON text, where the field is one."""
    if name in ("steps", "meta") and isinstance(text, str):
        with contextlib.suppress(ValueError, RecursionError):
            return canonical.decode(text)
    return text


_CONSTANT = re.compile(rb"\b(?:NaN|Infinity)\b")
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")


def _line_parser(span: _Span, unused: dict[str, int]) -> Callable[[bytes], Example]:
    limits, split, most = span.limits, span.split, span.limits.body_bytes
    read = formats.reader(span.form, limits, span.mapping, split, has_columns=False, unused=unused)
    keeps_spelling = "tools" in span.mapping or "messages" in span.mapping
    quotes, trace_quotes, from_trace = canonical.quotes, formats.trace_quotes, formats.from_trace
    decode = formats.trace_decoder(limits)
    # The slow parser has better messages.
    errors = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

    def parse_trace(line: bytes) -> Example:
        if len(line) <= most:
            try:
                trace = decode(line)
            except errors:
                return parse(line)
            if quotes(line) == trace_quotes(trace):
                return from_trace(trace, split)
        return parse(line)

    def parse_plain(line: bytes) -> Any:
        try:
            return canonical.parse(line)
        except ValueError:
            if span.form == "trace" or not _CONSTANT.search(line):
                raise
            # Python writes a missing number of a table as NaN.
            return canonical.decode(line, parse_constant=lambda _: None)

    def parse(line: bytes) -> Example:
        if len(line) - line.endswith(b"\n") > most:
            raise ValueError(f"the line is longer than {most} bytes")
        line = line.removeprefix(codecs.BOM_UTF8)
        may_call = b"tool" in line or b"function" in line or _ESCAPED_LETTER.search(line)
        try:
            tree = json_text.parse(line) if keeps_spelling or may_call else parse_plain(line)
        except UnicodeDecodeError as error:
            raise ValueError(rows.not_utf8(error)) from error
        if not isinstance(tree, dict):
            raise ValueError(f"Expected `object`, got {type(tree).__name__}")
        return read(tree)

    return parse_trace if span.form == "trace" and not span.mapping else parse


def _bad(number: int, row: Any, error: Exception) -> _Bad:
    reason = one_line(error, 10_000)
    text = row.decode("utf-8", "replace") if isinstance(row, bytes) else str(row)
    # A lone surrogate in a message would have no UTF-8.
    return _Bad(number, _printable(reason), _printable(text[:2_000]))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _reject(source: Source, bad: _Bad, lines: int, form: str) -> Reject:
    what = "a reasoning trace" if form == "trace" else f"a row of {form}"
    return Reject(f"{source.path}:{lines + bad.number}", f"not {what}: {bad.reason}", bad.row)


def _refusal(rejects: list[Reject], *, more: bool) -> DatasetError:
    message = "; ".join(f"{r.where}: {r.reason[:300]}" for r in rejects[:5])
    count = len(rejects) - 5
    if count > 0 or more:
        message += f"; and {max(count, 0)} more" + (" so far" if more else "")
    plural = "them" if len(rejects) > 1 else "it"
    return DatasetError(f"{message}. Nothing was stored; fix {plural}, or give --skip-bad")


def _main() -> None:
    """Read the span that is on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    span = msgspec.json.decode(sys.stdin.buffer.read(), type=_Span)

    def write(line: bytes) -> None:
        try:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    try:
        outcome = _parse(span, lambda done: write(b"%d" % done))
    except DatasetError as error:
        outcome = _Outcome(0, 0, [], False, error=str(error))
    write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    _main()
