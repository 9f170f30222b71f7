"""Suite `startup`: the time until the first step, cold and warm; the cost of a command and plugins.

Cold is without a compiled step in the cache, warm with one. Every start is a new process.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import peers
from tunix_mlflow.benchmarks.peer_process import Peer, PeerProcess, inherited_environment
from tunix_mlflow.benchmarks.trainers import task as tasks
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import BenchmarkError

_WITH_PLUGINS = "import mlflow"
# The same as if this project were not installed.
_WITHOUT_PLUGINS = """
import importlib.metadata as metadata
original = metadata.entry_points
metadata.entry_points = lambda **params: metadata.EntryPoints(
    e for e in original(**params) if not e.value.startswith("tunix_mlflow.")
)
import mlflow
"""


def measure(
    config: Config, folder: Path, python: Path | None, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Start everything `repeats` times, in turns.

    Args:
        config: model, optimizer, batch size and sequence length are read.
        folder: an empty one.
        python: the interpreter of the peers' environment; None: without PeftTrainer.
        report: receives one-line messages.

    Returns:
        Name -> its repeats: seconds until the first step is done, of compiling it, of processor
        time.

    Raises:
        BenchmarkError: if a process fails, with the last line of its output.
    """
    (folder / "full").mkdir()
    tasks.write(folder / "full", peers.task(config, "full")._replace(stops=[0, 1]))
    peers.write_configs(config, folder)
    figures: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)
        report(f"{name} {value:.3f}")

    for _ in range(config.benchmark.repeats):
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        for name in ("cold", "warm"):
            first, compiling = _first_step(peers.OURS, folder, Path(sys.executable), cache)
            add(f"first_step_{name}_s", first)
            add(f"compile_{name}_s", compiling)
        if python is not None:
            first, _ = _first_step(peers.PEFT_TRAINER, folder, python, cache)
            add("first_step_peft_trainer_s", first)
        add("first_step_tracked_cold_s", _tracked_first_step(config, folder))
        add("help_cpu_s", _cpu_seconds(["-m", "tunix_mlflow.cli.main", "--help"]))
        add("plugins_s", sum(plugin_imports().values()))
    return figures


def table(figures: Mapping[str, Sequence[float]]) -> str:
    """Return medians and ranges as Markdown."""
    rows = ["| figure | median | from | to |", "|---|---|---|---|"]
    for name, values in figures.items():
        median = statistics.median(values)
        rows.append(f"| {name} | {median:.3f} | {min(values):.3f} | {max(values):.3f} |")
    return "\n".join(rows)


def plugin_imports() -> dict[str, float]:
    """Return module -> seconds of each module that `import mlflow` loads for our plugins.

    Raises:
        BenchmarkError: if mlflow loads none of them.
    """
    without = _import_seconds(_WITHOUT_PLUGINS)
    added = {
        name: seconds
        for name, seconds in _import_seconds(_WITH_PLUGINS).items()
        if name not in without
    }
    if not any(name.startswith("tunix_mlflow.") for name in added):
        raise BenchmarkError("mlflow loads none of our plugins; is tunix-mlflow installed?")
    return added


def _first_step(peer: Peer, folder: Path, python: Path, cache: Path) -> tuple[float, float]:
    """Return seconds from the start of the process, and those of compiling the step."""
    process = PeerProcess(peer, folder, python, cache)
    try:
        process.turn()
        return process.seconds_since_start(), process.compile_seconds
    finally:
        process.stop()


def _tracked_first_step(config: Config, folder: Path) -> float:
    """Return seconds until a recorded training has done its first step, all caches empty."""
    home, log = folder / "tracked", folder / "tracked.log"
    shutil.rmtree(home, ignore_errors=True)
    (folder / "tracked.yaml").write_bytes(to_json(config))  # JSON is YAML
    arguments = ["-m", "projects.train", "--config", str(folder / "tracked.yaml")]
    arguments += ["--dataset", "golden-v2", "--device", "cpu", "--data.packing", "true"]
    arguments += ["--training.steps", "2", "--training.eval_every_steps", "0"]
    arguments += ["--training.save_every_steps", "0", "--evaluation.samples", "0"]
    variables = {"TUNIX_MLFLOW_HOME": str(home), "PYTHONPATH": str(paths.project_root())}
    variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'tracked.db'}"}
    variables |= {"JAX_COMPILATION_CACHE_DIR": str(home / "cache")}
    start = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**inherited_environment(), **variables},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=out,
        )
    try:
        while process.poll() is None:
            if any("first_step_ms" in f.read_text() for f in home.glob("runs/*/metrics.jsonl")):
                return time.perf_counter() - start
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise BenchmarkError(f"training failed: {''.join(last)}")


def _cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the processor seconds of a Python process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise BenchmarkError(f"{' '.join(arguments)} failed, exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def _import_seconds(code: str) -> dict[str, float]:
    """Return module -> seconds of its own, of all that some code imports."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", process.stderr)
    return {name: int(microseconds) / 1e6 for microseconds, name in lines}
