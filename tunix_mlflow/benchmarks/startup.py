"""Suite `startup`: the time until the first step, cold and warm; what a command and a plugin cost.

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
from collections.abc import Callable, Sequence
from pathlib import Path

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import peers
from tunix_mlflow.benchmarks.contenders import task as tasks
from tunix_mlflow.benchmarks.peers import Contender, Racer
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import BenchmarkError

_WITH = "import mlflow"
# The same as if this project were not installed.
_WITHOUT = """
import importlib.metadata as metadata
found = metadata.entry_points
metadata.entry_points = lambda **words: metadata.EntryPoints(
    e for e in found(**words) if not e.value.startswith("tunix_mlflow.")
)
import mlflow
"""


def measure(
    config: Config, folder: Path, python: Path | None, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Start `repeats` times each, in turns.

    Args:
        config: model, optimizer, batch size and sequence length are read.
        folder: an empty one.
        python: the interpreter of the peers' environment; None: without PeftTrainer.
        say: receives one-line messages.

    Returns:
        Name -> its repeats: seconds until the first step is done, of compiling it, of processor
        time.

    Raises:
        BenchmarkError: if a process fails, with its last words.
    """
    (folder / "full").mkdir()
    tasks.write(folder / "full", peers.task(config, "full")._replace(stops=[0, 1]))
    peers.write_configs(config, folder)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        say(f"{name} {value:.3f}")

    for _ in range(config.benchmark.repeats):
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        for name in ("cold", "warm"):
            first, compiling = _first_step(peers.OURS, folder, Path(sys.executable), cache)
            note(f"first_step_{name}_s", first)
            note(f"compile_{name}_s", compiling)
        if python is not None:
            note(
                "first_step_peft_trainer_s",
                _first_step(peers.PEFT_TRAINER, folder, python, cache)[0],
            )
        note("first_step_tracked_cold_s", _tracked(config, folder))
        note("help_cpu_s", _cpu(["-m", "tunix_mlflow.cli.main", "--help"]))
        note("plugins_s", plugins())
    return found


def table(found: dict[str, list[float]]) -> str:
    """Medians and spread, as Markdown."""
    rows = ["| | median | from | to |", "|---|---|---|---|"]
    for name, values in found.items():
        middle = statistics.median(values)
        rows.append(f"| {name} | {middle:.3f} | {min(values):.3f} | {max(values):.3f} |")
    return "\n".join(rows)


def _first_step(
    contender: Contender, folder: Path, python: Path, cache: Path
) -> tuple[float, float]:
    """Seconds from the start of the process, and of compiling the step within."""
    racer = Racer(contender, folder, python, cache)
    try:
        racer.turn()
        return time.perf_counter() - racer.started, racer.compiling
    finally:
        racer.stop()


def _tracked(config: Config, folder: Path) -> float:
    """Seconds until a training that MLflow records has done its first step, all caches empty."""
    home, log = folder / "tracked", folder / "tracked.log"
    shutil.rmtree(home, ignore_errors=True)
    (folder / "tracked.yaml").write_bytes(to_json(config))  # JSON is YAML
    words = ["-m", "projects.train", "--config", str(folder / "tracked.yaml")]
    words += ["--dataset", "golden-v2", "--device", "cpu", "--data.packing", "true"]
    words += ["--training.steps", "2", "--training.eval_every_steps", "0"]
    words += ["--training.save_every_steps", "0", "--evaluation.samples", "0"]
    env = {"TUNIX_MLFLOW_HOME": str(home), "PYTHONPATH": str(paths.project_root())}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'tracked.db'}"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(home / "cache")}
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *words],
            env={**peers.as_they_come(), **env},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=out,
        )
    try:
        while process.poll() is None:
            if any("first_step_ms" in f.read_text() for f in home.glob("runs/*/metrics.jsonl")):
                return time.perf_counter() - started
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise BenchmarkError(f"training failed: {''.join(last)}")


def _cpu(words: Sequence[str]) -> float:
    """Processor seconds of a Python process."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise BenchmarkError(f"{' '.join(words)} failed")
    return used.ru_utime + used.ru_stime


def plugins() -> float:
    """Seconds that our plugins add to `import mlflow`: of each module that is loaded for them.

    Raises:
        BenchmarkError: if mlflow loads none of them.
    """
    without = _imports(_WITHOUT)
    added = {name: took for name, took in _imports(_WITH).items() if name not in without}
    if not any(name.startswith("tunix_mlflow.") for name in added):
        raise BenchmarkError("mlflow loads none of our plugins: is tunix-mlflow installed?")
    return sum(added.values())


def _imports(code: str) -> dict[str, float]:
    """Module -> seconds of its own, of all that a statement loads."""
    words = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
    return {name: int(took) / 1e6 for took, name in lines}
