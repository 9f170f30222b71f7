"""Suite `data`: ingest, build, verify and export of generated traces.

Each operation runs in a process of its own, which measures itself: wall and CPU seconds of the
operation without the start of Python, and the peak of its memory. Two things give the figures a
scale, in the same run: the floor (one thread that parses, validates, encodes canonically and
hashes each line, and keeps nothing), and the logic of the system that this project re-makes
(validate with pydantic, store through sqlite, filter in Python), on a share of the traces.

    python -m tunix_mlflow.benchmarks.data OPERATION FILE      # what a child process runs
"""

from __future__ import annotations

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
_TOPICS = ("algebra", "geometry", "logic", "chess", "history", "physics", "music", "law")


def generate(path: Path, traces: int) -> None:
    """Write `traces` lines of some 770 bytes, the same each time."""
    rng = random.Random(0)
    words = [
        f"{a}{b}" for a in ("re", "un", "sub", "mono", "tri") for b in ("lates", "folds", "ns")
    ]
    chunks = [" ".join(rng.choices(words, k=14)) for _ in range(5_000)]
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
        Flat figures: seconds (`_wall_s`, `_cpu_s`), ratios of wall and CPU seconds to the
        floor's, peak memory in MB, and CPU seconds of the seed system's logic by ours, both per
        trace (`seed_over_ours_`).
    """
    file, share = folder / "traces.jsonl", folder / "share.jsonl"
    peer_traces = min(peer_traces, traces)
    generate(file, traces)
    generate(share, peer_traces)
    figures = {"traces": float(traces), "bytes": float(file.stat().st_size)}
    floors = [_child("floor", file, folder)]
    ours = {}
    for name in STAGES:
        ours[name] = _child(name, file, folder)
        say(f"{name}: {ours[name]['wall_s']:.2f} s")
    floors.append(_child("floor", file, folder))
    theirs = {}
    for name in STAGES:
        theirs[name] = _child(f"seed_{name}", share, folder)
        say(f"the seed system's {name}, {peer_traces:,} traces: {theirs[name]['wall_s']:.2f} s")
    for clock in ("wall_s", "cpu_s"):
        figures[f"floor_{clock}"] = statistics.median(floor[clock] for floor in floors)
    for name in STAGES:
        for clock in ("wall_s", "cpu_s"):
            figures[f"{name}_{clock}"] = ours[name][clock]
            figures[f"{name}_{clock[:-2]}_over_floor"] = (
                ours[name][clock] / figures[f"floor_{clock}"]
            )
        figures[f"{name}_peak_mb"] = ours[name]["peak_mb"]
        per_trace = theirs[name]["cpu_s"] / peer_traces
        figures[f"seed_over_ours_{name}"] = per_trace / (ours[name]["cpu_s"] / traces)
    return figures


def table(figures: dict[str, float]) -> str:
    """The figures as a Markdown table."""
    rows = [
        f"{figures['traces']:,.0f} traces, {figures['bytes'] / 1e6:,.0f} MB;"
        f" floor {figures['floor_wall_s']:.2f} s",
        "",
        "| stage | wall s | CPU s | wall by floor | peak MB | seed system's CPU by ours |",
        "|---|---|---|---|---|---|",
    ]
    for name in STAGES:
        rows.append(
            f"| {name.replace('_', ' ')} | {figures[f'{name}_wall_s']:.2f}"
            f" | {figures[f'{name}_cpu_s']:.2f} | {figures[f'{name}_wall_over_floor']:.2f}"
            f" | {figures[f'{name}_peak_mb']:.0f} | {figures[f'seed_over_ours_{name}']:.1f} |"
        )
    return "\n".join(rows)


def _child(operation: str, file: Path, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tunix_mlflow.benchmarks.data", operation, str(file)],
        env=os.environ | {state.HOME_VARIABLE: str(folder / "home")},
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
    assert datasets.verify("bench-v1").ok


def _export(file: Path) -> None:
    datasets.export("bench-v1", file.with_name("export.jsonl"))


def _pydantic() -> Any:
    from pydantic import BaseModel, ConfigDict, Field

    class Step(BaseModel):
        model_config = ConfigDict(extra="forbid")
        i: int = Field(ge=0)
        type: str = Field(min_length=1, max_length=64)
        content: str = Field(min_length=1, max_length=20_000)

    class Trace(BaseModel):
        model_config = ConfigDict(extra="forbid")
        prompt: str = Field(min_length=1, max_length=50_000)
        steps: list[Step] = Field(min_length=1, max_length=1_000)
        answer: str = Field(min_length=1, max_length=50_000)
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
    stored = {row: trace.model_validate_json(text) for row, text in _seed_rows(file)}
    assert len(stored) == manifest["count"]
    assert set(stored) == set(manifest["trace_ids"])


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
    wall, cpu = time.perf_counter(), time.process_time()
    _OPERATIONS[operation](file)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kB here
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": peak / scale}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
