"""Suite `data`: ingest, build, verify and export of generated traces.

Each operation runs in a process of its own, which measures itself: wall and CPU seconds (user and
system, of all its threads and children) of the operation without the start of Python and its
imports, and the peak of its memory. Two things give the figures a scale, in the same run: the
floor (one thread that parses, validates, encodes canonically and hashes each line, and keeps
nothing), and :mod:`tunix_mlflow.benchmarks.seed_system`.

How to read it: the ratio of wall seconds to the floor is how long a user waits, the ratio of CPU
seconds to the floor how much the machine works, and where CPU is above wall, more than one core was
busy. The floor is measured before, between and after our operations; where its runs differ, the
machine was busy with something else, and a ratio is no more certain than they agree. The seed
system's logic runs on fewer traces, and its CPU seconds are scaled linearly, per trace. A dataset
above `datasets.SMALL` gets no snapshot at ingest or build; the filtered one, which is below, does.

    python -m tunix_mlflow.benchmarks.data OPERATION FILE      # what a child process runs
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import seed_system
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import formats
from tunix_mlflow.data.examples import canonical_bytes
from tunix_mlflow.data.manifest import Selection
from tunix_mlflow.errors import BenchmarkError

STAGES = ("ingest", "build_all", "build_filtered", "verify", "export")
FILTERED = 10_000
"""Most traces of the filtered build; of a million, some 100,000 match its filters."""
FILTERS: dict[str, Any] = {"topic": "logic", "difficulty": {"ge": 2}}
_TOPICS = ("algebra", "geometry", "logic", "chess", "history", "physics", "music", "law")


def generate(path: Path, traces: int) -> None:
    """Write `traces` lines of some 770 bytes, the same each time; fewer are a prefix of more."""
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
    folder: Path, *, traces: int, peer_traces: int, report: Callable[[str], None]
) -> dict[str, float]:
    """Run everything, one after the other; the floor before, between and after.

    Args:
        folder: an empty one; the state root of the run is in it.
        traces: for our operations and the floor.
        peer_traces: for the seed system's logic, at most `traces`; figures are per trace.
        report: receives one-line messages.

    Returns:
        Flat figures: seconds (`_wall_s`, `_cpu_s`; of the floor the median, and each run as
        `floor_1_` and so on), ratios of wall and CPU seconds to the floor's (`_over_floor`),
        peak memory in MB (`_peak_mb`), CPU microseconds per trace of the seed system's logic
        (`seed_STAGE_cpu_us_per_trace`), and their ratio to ours (`seed_over_ours_cpu_STAGE`).
    """
    file, peer_file = folder / "traces.jsonl", folder / "peer_traces.jsonl"
    peer_traces = min(peer_traces, traces)
    generate(file, traces)
    generate(peer_file, peer_traces)
    figures = {
        "traces": float(traces),
        "peer_traces": float(peer_traces),
        "bytes": float(file.stat().st_size),
    }

    def run(operation: str, traces_file: Path) -> dict[str, float]:
        result = run_in_child(operation, traces_file, folder)
        report(f"{operation}: {result['wall_s']:.2f} s, CPU {result['cpu_s']:.2f} s")
        return result

    floors = [run("floor", file)]
    ours = {}
    for name in STAGES:
        ours[name] = run(name, file)
        if name == "build_filtered":
            floors.append(run("floor", file))
    floors.append(run("floor", file))
    report(f"the seed system's logic, on {peer_traces:,} traces")
    seed = {name: run(f"seed_{name}", peer_file) for name in STAGES}
    for clock in ("wall_s", "cpu_s"):
        figures[f"floor_{clock}"] = statistics.median(floor[clock] for floor in floors)
        for index, floor in enumerate(floors, start=1):
            figures[f"floor_{index}_{clock}"] = floor[clock]
    figures["floor_peak_mb"] = max(floor["peak_mb"] for floor in floors)
    for name in STAGES:
        for clock in ("wall_s", "cpu_s"):
            figures[f"{name}_{clock}"] = ours[name][clock]
            figures[f"{name}_{clock[:-2]}_over_floor"] = (
                ours[name][clock] / figures[f"floor_{clock}"]
            )
        figures[f"{name}_peak_mb"] = ours[name]["peak_mb"]
        per_trace = seed[name]["cpu_s"] / peer_traces
        figures[f"seed_{name}_cpu_us_per_trace"] = 1e6 * per_trace
        figures[f"seed_over_ours_cpu_{name}"] = per_trace / (ours[name]["cpu_s"] / traces)
    return figures


def table(figures: Mapping[str, float]) -> str:
    """Return the figures as Markdown."""
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
        "| stage | wall s | CPU s | wall, ratio to the floor | CPU, ratio to the floor | peak MB"
        " | CPU of the seed system, ratio to ours |",
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


def run_in_child(operation: str, file: Path, folder: Path) -> dict[str, float]:
    """Run one operation in a process of its own.

    Args:
        operation: `floor`, one of STAGES, or `seed_` and one of STAGES.
        file: the traces.
        folder: for the state root.

    Returns:
        `wall_s`, `cpu_s` and `peak_mb`.

    Raises:
        BenchmarkError: if it fails, with the last line of its output.
    """
    # A shared snapshot folder would be written to, and the next run would find it filled.
    variables = {k: v for k, v in os.environ.items() if k != paths.SNAPSHOTS_VARIABLE}
    process = subprocess.run(
        [sys.executable, "-m", "tunix_mlflow.benchmarks.data", operation, str(file)],
        env=variables | {paths.HOME_VARIABLE: str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        raise BenchmarkError(f"{operation} failed, exit code {process.returncode}: {''.join(last)}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def _floor(file: Path) -> None:
    decode = formats.trace_decoder(LimitsConfig())
    with file.open("rb") as lines:
        for line in lines:
            hashlib.sha256(canonical_bytes(formats.from_trace(decode(line), None))).hexdigest()


# Modules are imported late: a child loads only those of its operation, before the clock starts.


def _ingest(file: Path) -> None:
    from tunix_mlflow.data import datasets

    datasets.ingest(file, "bench-v1")


def _build_all(file: Path) -> None:
    from tunix_mlflow.data import datasets

    datasets.build("bench-v2", Selection(order="all"))


def _build_filtered(file: Path) -> None:
    from tunix_mlflow.data import datasets

    datasets.build("bench-v3", Selection(filters=FILTERS, limit=FILTERED))


def _verify(file: Path) -> None:
    from tunix_mlflow.data import datasets

    report = datasets.verify("bench-v1")
    if not report.ok:
        raise RuntimeError(f"bench-v1 is damaged: {report.summary()}")


def _export(file: Path) -> None:
    from tunix_mlflow.data import datasets

    datasets.export("bench-v1", file.with_name("export.jsonl"))


def _seed_build_all(file: Path) -> None:
    seed_system.build(file, file.with_suffix(".manifest.json"), {}, None)


def _seed_build_filtered(file: Path) -> None:
    seed_system.build(file, file.with_suffix(".filtered.json"), FILTERS, FILTERED)


def _seed_verify(file: Path) -> None:
    seed_system.verify(file, file.with_suffix(".manifest.json"))


def _seed_export(file: Path) -> None:
    seed_system.export(file, file.with_suffix(".manifest.json"), file.with_suffix(".export"))


_OPERATIONS: dict[str, Callable[[Path], None]] = {
    "floor": _floor,
    "ingest": _ingest,
    "build_all": _build_all,
    "build_filtered": _build_filtered,
    "verify": _verify,
    "export": _export,
    "seed_ingest": seed_system.ingest,
    "seed_build_all": _seed_build_all,
    "seed_build_filtered": _seed_build_filtered,
    "seed_verify": _seed_verify,
    "seed_export": _seed_export,
}


def main(operation: str, file: Path) -> None:
    """Run one operation and print what it took, as JSON."""
    if operation.startswith("seed_"):
        seed_system.models()
    elif operation != "floor":
        importlib.import_module("tunix_mlflow.data.datasets")
    with _PeakMemory() as memory:
        if operation == "ingest":
            memory.watch_children()
        wall, cpu = time.perf_counter(), _cpu_seconds()
        _OPERATIONS[operation](file)
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": memory.peak_mb}))


def _cpu_seconds() -> float:
    """Return user and system seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class _PeakMemory:
    """The peak of the memory, in MB, that this process and its children hold together.

    Its own peak is exact; with children, memory is sampled four times a second.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        return self

    def watch_children(self) -> None:
        """Start to sample; it costs a little time."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        # Linux's ru_maxrss starts at the peak of the parent; VmHWM does not.
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
            rss = process.memory_info().rss
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rss += child.memory_info().rss
            self.peak_mb = max(self.peak_mb, rss / 1e6)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
