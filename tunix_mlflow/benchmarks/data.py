"""Suite `data`: ingest, build, verify and export of generated traces.

Each operation runs in a process of its own, which measures itself: wall and CPU seconds (user and
system, of all its threads and children) of the operation without the start of Python and its
imports, and the peak of its memory. Two things give the figures a scale, in the same run: the
floor (one thread that parses, validates, encodes canonically and hashes each line, and keeps
nothing), and the logic of the system that this project re-makes (validate with pydantic, store
through sqlite, filter in Python).

How to read it: wall by floor is what a user waits for, CPU by floor what the machine works for,
and where CPU is above wall, more than one core was busy. The floor is taken before, amid and after
our stages; where its runs differ, the machine was busy with something else and a ratio is no
surer than they agree. The seed system's logic runs on fewer traces, and its CPU seconds are scaled
linearly, per trace. It does less than ours: no digests, no splits, and its verify does not tell a
changed text. A dataset above `datasets.SMALL` gets no snapshot at ingest or build; the filtered
one, which is below, does.

    python -m tunix_mlflow.benchmarks.data OPERATION FILE      # what a child process runs
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunix_mlflow import state
from tunix_mlflow.config import LimitsConfig
from tunix_mlflow.data import datasets, formats
from tunix_mlflow.data.examples import canonical_bytes
from tunix_mlflow.data.manifest import Selection

STAGES = ("ingest", "build_all", "build_filtered", "verify", "export")
FILTERED = 10_000
"""Most traces of the filtered build; of a million, some 100,000 meet its filters."""
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
    own = {k: v for k, v in os.environ.items() if k != state.SNAPSHOTS_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "tunix_mlflow.benchmarks.data", operation, str(file)],
        env=own | {state.HOME_VARIABLE: str(folder / "home")},
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
    filters = {"topic": "logic", "difficulty": {"ge": 2}}
    datasets.build("bench-v3", Selection(filters=filters, limit=FILTERED))


def _verify(file: Path) -> None:
    report = datasets.verify("bench-v1")
    if not report.ok:
        raise RuntimeError(f"bench-v1 is damaged: {report.summary()}")


def _export(file: Path) -> None:
    datasets.export("bench-v1", file.with_name("export.jsonl"))


@functools.cache
def _pydantic() -> Any:
    """The seed system's model of a trace, with our limits."""
    from pydantic import BaseModel, ConfigDict, Field

    limits = LimitsConfig()

    class Step(BaseModel):
        model_config = ConfigDict(extra="forbid")
        i: int = Field(ge=0)
        type: str = Field(min_length=1, max_length=limits.type_characters)
        content: str = Field(min_length=1, max_length=limits.step_characters)

    class Trace(BaseModel):
        model_config = ConfigDict(extra="forbid")
        prompt: str = Field(min_length=1, max_length=limits.prompt_characters)
        steps: list[Step] = Field(min_length=1, max_length=limits.steps)
        answer: str = Field(min_length=1, max_length=limits.answer_characters)
        meta: dict[str, Any] | None = None

    Trace.model_rebuild(_types_namespace={"Step": Step, "Any": Any})
    return Trace


def _seed_ingest(file: Path) -> None:
    trace = _pydantic()
    con = sqlite3.connect(file.with_suffix(".db"))
    con.execute("CREATE TABLE traces (id TEXT PRIMARY KEY, payload TEXT, created_at TEXT)")
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            payload = trace.model_validate_json(line).model_dump_json()
            row = (str(uuid.uuid4()), payload, time.strftime("%Y-%m-%dT%H:%M:%S"))
            con.execute("INSERT INTO traces VALUES (?, ?, ?)", row)
            if number % 1_000 == 999:
                con.commit()
    con.commit()
    con.close()


def _seed_rows(file: Path) -> Iterator[tuple[str, str]]:
    con = sqlite3.connect(file.with_suffix(".db"))
    yield from con.execute("SELECT id, payload FROM traces ORDER BY created_at DESC, id")
    con.close()


def _seed_build(file: Path, wanted: Callable[[dict[str, Any]], bool], limit: int | None) -> None:
    ids = [row for row, text in _seed_rows(file) if wanted(json.loads(text)["meta"])][:limit]
    manifest = {"count": len(ids), "trace_ids": ids}
    file.with_suffix(".manifest.json").write_text(json.dumps(manifest))


def _seed_build_all(file: Path) -> None:
    _seed_build(file, lambda meta: True, None)


def _seed_build_filtered(file: Path) -> None:
    kept = file.with_suffix(".manifest.json").read_text()
    _seed_build(file, lambda m: m["topic"] == "logic" and m["difficulty"] >= 2, FILTERED)
    file.with_suffix(".manifest.json").write_text(kept)  # verify means all


def _seed_verify(file: Path) -> None:
    trace = _pydantic()
    manifest = json.loads(file.with_suffix(".manifest.json").read_text())
    stored = []
    for row, text in _seed_rows(file):
        trace.model_validate_json(text)
        stored.append(row)
    if len(stored) != manifest["count"] or set(stored) != set(manifest["trace_ids"]):
        raise RuntimeError("the seed system's rows are not those of its manifest")


def _seed_export(file: Path) -> None:
    trace = _pydantic()
    with file.with_suffix(".export").open("w", encoding="utf-8") as out:
        for _, text in _seed_rows(file):
            out.write(trace.model_validate_json(text).model_dump_json() + "\n")


_OPERATIONS: dict[str, Callable[[Path], None]] = {
    "floor": _floor,
    **{name: globals()[f"_{name}"] for name in STAGES},
    **{f"seed_{name}": globals()[f"_seed_{name}"] for name in STAGES},
}


def main(operation: str, file: Path) -> None:
    """Run one operation and print what it took, as JSON."""
    if operation.startswith("seed_"):
        _pydantic()  # imported and built before the clock starts, as our own modules are
    wall, cpu = time.perf_counter(), _cpu()
    _OPERATIONS[operation](file)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": _peak_mb()}))


def _cpu() -> float:
    """User and system seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_mb() -> float:
    """The most memory that this process held, in MB."""
    # Not Linux's ru_maxrss where it can be helped: that starts at the peak of the parent.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB here


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
