"""Suite `data`: ingest, build, verify and export of generated traces.

Each operation runs in a process of its own, which measures itself: wall and CPU seconds (user and
system, of all its threads and children) of the operation without the start of Python and its
imports, and the peak of its memory. Two things give the figures a scale, in the same run: the
floor (one thread that parses, validates, encodes canonically and hashes each line, and keeps
nothing), and the logic of the system that this project re-makes: json and pydantic, rows through
SQLAlchemy's ORM into SQLite, filters in Python.

How to read it: wall by floor is what a user waits for, CPU by floor what the machine works for,
and where CPU is above wall, more than one core was busy. The floor is taken before, amid and after
our stages; where its runs differ, the machine was busy with something else and a ratio is no
surer than they agree. The seed system's logic runs on fewer traces, and its CPU seconds are scaled
linearly, per trace. It is written after that system's services, and where those have a fast and a
slow way, the fast one is taken: synchronous sessions, one query to read a batch back. It does less
than ours: no digests, no splits, and its verify does not tell a changed text. A dataset above
`datasets.SMALL` gets no snapshot at ingest or build; the filtered one, which is below, does.

    python -m tunix_mlflow.benchmarks.data OPERATION FILE      # what a child process runs
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tunix_mlflow import paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import datasets, formats
from tunix_mlflow.data.examples import canonical_bytes
from tunix_mlflow.data.manifest import Selection

STAGES = ("ingest", "build_all", "build_filtered", "verify", "export")
FILTERED = 10_000
"""Most traces of the filtered build; of a million, some 100,000 meet its filters."""
FILTERS: dict[str, Any] = {"topic": "logic", "difficulty": {"ge": 2}}
_TOPICS = ("algebra", "geometry", "logic", "chess", "history", "physics", "music", "law")


def generate(path: Path, traces: int) -> None:
    """Write `traces` lines of some 770 bytes, the same each time; fewer are the first of more."""
    rng = random.Random(0)
    words = [
        f"{a}{b}" for a in ("re", "un", "sub", "mono", "tri") for b in ("lates", "folds", "ns")
    ]
    chunks = [" ".join(rng.choices(words, k=12)) for _ in range(5_000)]
    with path.open("w", encoding="utf-8") as out:
        for n in range(traces):
            steps = [{"i": i, "type": "reasoning", "content": rng.choice(chunks)} for i in range(4)]
            meta = {"topic": rng.choice(_TOPICS), "difficulty": n % 10, "source": "generated"}
            prompt = f"Question {n}: {rng.choice(chunks)}"
            line = {"prompt": prompt, "steps": steps, "answer": str(n * 7), "meta": meta}
            out.write(json.dumps(line) + "\n")


def measure(
    folder: Path, *, traces: int, peer_traces: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Run everything, one after the other; the floor before and after.

    Args:
        folder: scratch; the state root of the run is in it.
        traces: for our operations and the floor.
        peer_traces: for the seed system's logic, at most `traces`; figures are per trace.
        say: progress, in lines.

    Returns:
        Flat figures: seconds (`_wall_s`, `_cpu_s`; of the floor the median, and each run as
        `floor_1_` and so on), ratios of wall and CPU seconds to the floor's (`_over_floor`),
        peak memory in MB (`_peak_mb`), CPU microseconds a trace of the seed system's logic
        (`seed_STAGE_cpu_us_per_trace`), and these by ours (`seed_over_ours_cpu_STAGE`).
    """
    file, share = folder / "traces.jsonl", folder / "share.jsonl"
    peer_traces = min(peer_traces, traces)
    generate(file, traces)
    generate(share, peer_traces)
    figures = {
        "traces": float(traces),
        "peer_traces": float(peer_traces),
        "bytes": float(file.stat().st_size),
    }

    def run(operation: str, over: Path) -> dict[str, float]:
        found = _child(operation, over, folder)
        say(f"{operation}: {found['wall_s']:.2f} s, CPU {found['cpu_s']:.2f} s")
        return found

    floors = [run("floor", file)]
    ours = {}
    for name in STAGES:
        ours[name] = run(name, file)
        if name == "build_filtered":
            floors.append(run("floor", file))
    floors.append(run("floor", file))
    say(f"the seed system's logic, on {peer_traces:,} traces")
    theirs = {name: run(f"seed_{name}", share) for name in STAGES}
    for clock in ("wall_s", "cpu_s"):
        figures[f"floor_{clock}"] = statistics.median(floor[clock] for floor in floors)
        for number, floor in enumerate(floors, start=1):
            figures[f"floor_{number}_{clock}"] = floor[clock]
    figures["floor_peak_mb"] = max(floor["peak_mb"] for floor in floors)
    for name in STAGES:
        for clock in ("wall_s", "cpu_s"):
            figures[f"{name}_{clock}"] = ours[name][clock]
            figures[f"{name}_{clock[:-2]}_over_floor"] = (
                ours[name][clock] / figures[f"floor_{clock}"]
            )
        figures[f"{name}_peak_mb"] = ours[name]["peak_mb"]
        per_trace = theirs[name]["cpu_s"] / peer_traces
        figures[f"seed_{name}_cpu_us_per_trace"] = 1e6 * per_trace
        figures[f"seed_over_ours_cpu_{name}"] = per_trace / (ours[name]["cpu_s"] / traces)
    return figures


def table(figures: dict[str, float]) -> str:
    """The figures as a Markdown table."""
    runs = ", ".join(
        f"{value:.2f}"
        for key, value in figures.items()
        if key.startswith("floor_") and key.endswith("_wall_s") and key != "floor_wall_s"
    )
    rows = [
        f"{figures['traces']:,.0f} traces, {figures['bytes'] / 1e6:,.0f} MB. Floor, the median of"
        f" {runs} s: {figures['floor_wall_s']:.2f} s, CPU {figures['floor_cpu_s']:.2f} s. The seed"
        f" system's logic ran on {figures['peer_traces']:,.0f} traces; its CPU is scaled linearly,"
        " per trace.",
        "",
        "| stage | wall s | CPU s | wall by floor | CPU by floor | peak MB"
        " | seed system's CPU by ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in STAGES:
        rows.append(
            f"| {name.replace('_', ' ')} | {figures[f'{name}_wall_s']:.2f}"
            f" | {figures[f'{name}_cpu_s']:.2f} | {figures[f'{name}_wall_over_floor']:.2f}"
            f" | {figures[f'{name}_cpu_over_floor']:.2f} | {figures[f'{name}_peak_mb']:.0f}"
            f" | {figures[f'seed_over_ours_cpu_{name}']:.2g} |"
        )
    return "\n".join(rows)


def _child(operation: str, file: Path, folder: Path) -> dict[str, float]:
    # A shared snapshot folder would be written to, and spare the second run the writing.
    own = {k: v for k, v in os.environ.items() if k != paths.SNAPSHOTS_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "tunix_mlflow.benchmarks.data", operation, str(file)],
        env=own | {paths.HOME_VARIABLE: str(folder / "home")},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _floor(file: Path) -> None:
    decode = formats.trace_decoder(LimitsConfig())
    with file.open("rb") as lines:
        for line in lines:
            hashlib.sha256(canonical_bytes(formats.from_trace(decode(line), None))).hexdigest()


def _ingest(file: Path) -> None:
    datasets.ingest(file, "bench-v1")


def _build_all(file: Path) -> None:
    datasets.build("bench-v2", Selection(order="all"))


def _build_filtered(file: Path) -> None:
    datasets.build("bench-v3", Selection(filters=FILTERS, limit=FILTERED))


def _verify(file: Path) -> None:
    report = datasets.verify("bench-v1")
    if not report.ok:
        raise RuntimeError(f"bench-v1 is damaged: {report.summary()}")


def _export(file: Path) -> None:
    datasets.export("bench-v1", file.with_name("export.jsonl"))


class _Seed(NamedTuple):
    """What the seed system's services work with."""

    trace: Any  # its pydantic model of a trace
    row: Any  # its SQLAlchemy model of the table
    session: Callable[[Path], Any]


@functools.cache
def _seed() -> _Seed:
    """The seed system's models, with our limits.

    As in github.com/m-cahill/tunix-rt: schemas/trace.py, db/models/trace.py.
    """
    import sqlalchemy
    from pydantic import BaseModel, Field, field_validator
    from sqlalchemy import orm

    limits = LimitsConfig()

    class Step(BaseModel):
        i: int = Field(ge=0)
        type: str = Field(min_length=1, max_length=limits.type_characters)
        content: str = Field(min_length=1, max_length=limits.step_characters)

    class Trace(BaseModel):
        prompt: str = Field(min_length=1, max_length=limits.prompt_characters)
        answer: str = Field(min_length=1, max_length=limits.answer_characters)
        steps: list[Step] = Field(min_length=1, max_length=limits.steps)
        meta: dict[str, Any] | None = None

        @field_validator("steps")
        @classmethod
        def unique(cls, steps: list[Any]) -> list[Any]:
            if len({step.i for step in steps}) != len(steps):
                raise ValueError("step indices must be unique")
            return steps

    Trace.model_rebuild(_types_namespace={"Step": Step, "Any": Any})
    base = orm.declarative_base()
    columns = {
        "__tablename__": "traces",
        "id": sqlalchemy.Column(sqlalchemy.Uuid, primary_key=True, default=uuid.uuid4),
        "created_at": sqlalchemy.Column(
            sqlalchemy.DateTime(timezone=True), default=lambda: datetime.now(UTC), index=True
        ),
        "trace_version": sqlalchemy.Column(sqlalchemy.String(64), nullable=False),
        "payload": sqlalchemy.Column(sqlalchemy.JSON, nullable=False),
    }
    row = type("Row", (base,), columns)

    def session(file: Path) -> Any:
        engine = sqlalchemy.create_engine(f"sqlite:///{file.with_suffix('.db')}")
        base.metadata.create_all(engine)
        return orm.Session(engine)

    return _Seed(Trace, row, session)


def _seed_ingest(file: Path) -> None:
    from sqlalchemy import select

    trace, row, session = _seed()
    with file.open(encoding="utf-8") as lines, session(file) as db:
        for batch in _batched(lines):
            models = [trace(**json.loads(line)) for line in batch]
            stored = [row(trace_version="1.0", payload=m.model_dump()) for m in models]
            db.add_all(stored)
            db.commit()
            ids = [one.id for one in db.scalars(select(row).where(row.id.in_(_ids(stored))))]
            if len(ids) != len(batch):
                raise RuntimeError("the seed system lost a trace")
            db.expunge_all()


def _ids(stored: list[Any]) -> list[uuid.UUID]:
    # Not `one.id`, which would read each again: the commit has expired it.
    from sqlalchemy import inspect

    return [inspect(one).identity[0] for one in stored]


def _seed_build(file: Path, filters: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from sqlalchemy import select

    _, row, session = _seed()
    with session(file) as db:
        found = db.scalars(select(row).order_by(row.created_at.desc())).all()
        chosen = [one for one in found if _meets(one.payload.get("meta") or {}, filters)][:limit]
        steps = [len(one.payload["steps"]) for one in chosen]
        sizes = [
            len(one.payload["prompt"])
            + len(one.payload["answer"])
            + sum(len(step["content"]) for step in one.payload["steps"])
            for one in chosen
        ]
        stats = {"steps": statistics.fmean(steps), "characters": statistics.fmean(sizes)}
        return {"ids": [str(one.id) for one in chosen], "count": len(chosen), "stats": stats}


def _meets(meta: dict[str, Any], filters: dict[str, Any]) -> bool:
    return all(
        meta[key] >= value["ge"] if isinstance(value, dict) else meta.get(key) == value
        for key, value in filters.items()
    )


def _seed_build_all(file: Path) -> None:
    made = _seed_build(file, {}, None)
    file.with_suffix(".manifest.json").write_text(json.dumps(made))


def _seed_build_filtered(file: Path) -> None:
    made = _seed_build(file, FILTERS, FILTERED)
    file.with_suffix(".filtered.json").write_text(json.dumps(made))


def _seed_verify(file: Path) -> None:
    trace, _, _ = _seed()
    manifest = json.loads(file.with_suffix(".manifest.json").read_text())
    found = []
    for one in _seed_members(file, manifest):
        trace(**one.payload)
        found.append(str(one.id))
    if found != manifest["ids"]:
        raise RuntimeError("the seed system's rows are not those of its manifest")


def _seed_export(file: Path) -> None:
    trace, _, _ = _seed()
    manifest = json.loads(file.with_suffix(".manifest.json").read_text())
    lines = []
    for one in _seed_members(file, manifest):
        payload = trace(**one.payload)
        record = {
            "id": str(one.id),
            "prompt": payload.prompt,
            "steps": [step.content for step in payload.steps],
            "answer": payload.answer,
            "metadata": {"created_at": one.created_at.isoformat(), **(payload.meta or {})},
        }
        lines.append(json.dumps(record))
    file.with_suffix(".export").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _seed_members(file: Path, manifest: dict[str, Any]) -> Iterator[Any]:
    """The manifest's traces, in its order; ids by the thousand, for SQLite takes no million."""
    from sqlalchemy import select

    _, row, session = _seed()
    with session(file) as db:
        for batch in _batched(manifest["ids"]):
            ids = [uuid.UUID(word) for word in batch]
            by_id = {one.id: one for one in db.scalars(select(row).where(row.id.in_(ids)))}
            yield from (by_id[one] for one in ids if one in by_id)
            db.expunge_all()


def _batched(found: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(found)
    while batch := list(itertools.islice(rest, 1_000)):  # the seed system's batch
        yield batch


_OPERATIONS: dict[str, Callable[[Path], None]] = {
    "floor": _floor,
    **{name: globals()[f"_{name}"] for name in STAGES},
    **{f"seed_{name}": globals()[f"_seed_{name}"] for name in STAGES},
}


def main(operation: str, file: Path) -> None:
    """Run one operation and print what it took, as JSON."""
    if operation.startswith("seed_"):
        _seed()  # imported and built before the clock starts, as our own modules are
    with _Memory() as memory:
        if operation == "ingest":
            memory.watch_children()
        wall, cpu = time.perf_counter(), _cpu()
        _OPERATIONS[operation](file)
        wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": memory.peak_mb}))


def _cpu() -> float:
    """User and system seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class _Memory:
    """The most memory, in MB, that this process and its children held together.

    Its own peak is exact; the children are looked at four times a second, where there are any.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        return self

    def watch_children(self) -> None:
        """Begin to look; it costs a little time."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        # Not Linux's ru_maxrss where it can be helped: that starts at the peak of the parent.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        own *= 1 if sys.platform == "darwin" else 1024
        status = Path("/proc/self/status")
        if status.exists():
            (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM:"))
            own = int(line.split()[1]) * 1024
        self.peak_mb = max(self.peak_mb, own / 1e6)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.25):
            held = process.memory_info().rss
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    held += child.memory_info().rss
            self.peak_mb = max(self.peak_mb, held / 1e6)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
