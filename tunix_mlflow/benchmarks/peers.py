"""Suite `peers`: the same shape on the same data by several trainers, taking turns.

Each is a process of its own, with the same weights to begin with, the same batches, float32 and
the same optimizer (AdamW, constant rate, gradients clipped by their global norm). Rows are full
(`full`), or hold documents of lognormal length with a median of 80 tokens (`mix`), one each where
the trainer does not pack. What counts is useful tokens: those that are not padding.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import workload
from tunix_mlflow.benchmarks.contenders import task as tasks
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config, MeshConfig
from tunix_mlflow.errors import BenchmarkError, ConfigError
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.models import decoder
from tunix_mlflow.models.hub import names
from tunix_mlflow.runtime import huge_pages

_HERE = "tunix_mlflow.benchmarks.contenders"


class Contender(NamedTuple):
    """One trainer on one kind of rows."""

    name: str
    data: str  # full, or mix
    module: str
    words: tuple[str, ...] = ()
    fast: bool = False  # ours, with the preset cpu-fast


OURS = Contender("ours", "full", "ours", ("padded",))
PEFT_TRAINER = Contender("PeftTrainer", "full", "peft_trainer")
CONTENDERS = (
    OURS,
    Contender("ours, cpu-fast", "full", "ours", ("padded",), True),
    PEFT_TRAINER,
    Contender("HF Trainer", "full", "hugging_face", ("trainer",)),
    Contender("ours, packed", "mix", "ours", ("packed",)),
    Contender("ours, packed, cpu-fast", "mix", "ours", ("packed",), True),
    Contender("ours, one a row", "mix", "ours", ("padded",)),
    Contender("PeftTrainer", "mix", "peft_trainer"),
    Contender("HF Trainer", "mix", "hugging_face", ("trainer",)),
    Contender("SFTTrainer", "mix", "hugging_face", ("sft",)),
    Contender("SFTTrainer, packed", "mix", "hugging_face", ("sft-packed",)),
)


class Result(NamedTuple):
    """What one contender did."""

    contender: Contender
    first_step_seconds: float  # from the start of its process
    useful_per_sec: list[float]  # tokens a second that are not padding, a repeat each
    step_seconds: list[float]
    peak_mb: float  # resident, of its process
    losses: list[float]  # nats a token, an update each

    @property
    def key(self) -> str:
        """For metrics."""
        name = self.contender.name.lower().replace(", ", "-").replace(" ", "-")
        return f"{self.contender.data}/{name}"

    def figures(self) -> dict[str, float]:
        """By name; medians of repeats."""
        values = {
            "useful_tokens_per_sec": statistics.median(self.useful_per_sec),
            "step_seconds": statistics.median(self.step_seconds),
            "first_step_seconds": self.first_step_seconds,
            "peak_mb": self.peak_mb,
            "last_loss": self.losses[-1],
        }
        return {f"{self.key}/{name}": value for name, value in values.items()}


def measure(config: Config, folder: Path, python: Path, say: Callable[[str], None]) -> list[Result]:
    """Let all contenders train, in turns.

    Args:
        config: model, optimizer, batch size, sequence length and `benchmark` are read.
        folder: an empty one, for the tasks and what the contenders print.
        python: the interpreter of the peers' environment.
        say: receives one-line messages.

    Raises:
        BenchmarkError: if a contender fails, with its last words.
    """
    chosen = config.benchmark
    wanted = [c for c in CONTENDERS if chosen.data in ("all", c.data) and c.fast <= chosen.cpu_fast]
    for data in {c.data for c in wanted}:
        (folder / data).mkdir()
        tasks.write(folder / data, task(config, data))
    write_configs(config, folder)
    racers: list[Racer] = []
    try:
        for contender in wanted:
            racers.append(Racer(contender, folder, python))
            say(f"{contender.data}, {contender.name}: first step after {racers[-1].first:.1f} s")
        for repeat in range(config.benchmark.repeats):
            for racer in racers if repeat % 2 == 0 else reversed(racers):
                racer.timed()
            say(f"repeat {repeat + 1} of {config.benchmark.repeats}")
        return [racer.finish() for racer in racers]
    finally:
        for racer in racers:
            racer.stop()


def as_they_come() -> dict[str, str]:
    """The environment for processes that are compared, without what this one gave itself."""
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    kept = ":".join(each for each in tunables if each != f"{huge_pages.TUNABLE}=1")
    others = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return others | {"GLIBC_TUNABLES": kept} if kept else others


def table(results: Sequence[Result]) -> str:
    """The results as Markdown; ratios are medians of paired repeats."""
    lines = [
        "| rows | trainer | useful tokens/s | by PeftTrainer | by HF Trainer | s a step"
        " | first step, s | peak MB | first loss | last loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rates = result.useful_per_sec
        ratios = [ratio(results, result, name) for name in ("PeftTrainer", "HF Trainer")]
        shown = ["" if r is None else f"{r:.2f}" for r in ratios]
        lines.append(
            f"| {result.contender.data} | {result.contender.name}"
            f" | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            f" | {shown[0]} | {shown[1]} | {statistics.median(result.step_seconds):.2f}"
            f" | {result.first_step_seconds:.1f} | {result.peak_mb:,.0f}"
            f" | {result.losses[0]:.4f} | {result.losses[-1]:.4f} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw useful tokens a second: medians as bars, repeats as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    names = [f"{r.contender.name} ({r.contender.data})" for r in results]
    middles = [statistics.median(r.useful_per_sec) for r in results]
    colours = ["C0" if r.contender.module == "ours" else "lightgrey" for r in results]
    axes.barh(names, middles, color=colours)
    for name, result in zip(names, results, strict=True):
        rates = result.useful_per_sec
        axes.plot(rates, [name] * len(rates), ".", color="black", markersize=3)
    axes.invert_yaxis()
    axes.set(xlabel="useful tokens/s; dots: repeats")
    figure.savefig(path, dpi=120)


def ratio(results: Sequence[Result], result: Result, name: str) -> float | None:
    """Its useful tokens a second by those of the trainer of that name on the same data."""
    for other in results:
        if other.contender.name == name and other.contender.data == result.contender.data:
            pairs = zip(result.useful_per_sec, other.useful_per_sec, strict=True)
            return statistics.median(a / b for a, b in pairs)
    return None


def interpreter(config: Config) -> Path:
    """Of the peers' environment.

    Raises:
        ConfigError: if it is not there, saying what makes it.
    """
    given = config.benchmark.peers_python
    path = Path(given) if given else paths.project_root() / ".venv-peers" / "bin" / "python"
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigError(
            f"the peers' environment is missing: no {path}; `make peers` in a checkout builds it,"
            " or set benchmark.peers_python"
        )
    return path


def task(config: Config, data: str) -> tasks.Task:
    """The work, on `full` rows or a `mix`, for as many updates as `benchmark` says."""
    bench, training, rule = config.benchmark, config.training, config.optimizer
    length = config.data.sequence_length or 0
    stops = _stops(config)
    count = (stops[-1] + 1) * training.batch_size
    made = workload.documents(data, count, length, bench.vocabulary)
    rows = workload.rows(made, length, packing=False)
    stream = TrainBatches(rows, batch_size=training.batch_size, seed=config.seed)
    order = [[row[0] for row in stream.rows_at(step)] for step in range(stops[-1] + 1)]
    _, params = decoder.build(config.model, bench.vocabulary, config.seed)
    return tasks.Task(
        model=msgspec.to_builtins(config.model),
        vocab_size=bench.vocabulary,
        length=length,
        batch_size=training.batch_size,
        learning_rate=rule.learning_rate,
        b1=rule.b1,
        b2=rule.b2,
        weight_decay=rule.weight_decay,
        clip_norm=rule.clip_norm,
        threads=int(os.environ["NPROC"]),  # which XLA reads
        stops=stops,
        documents=made,
        order=np.asarray(order, np.int32),
        weights=names.to_names(params, config.model),
    )


def _stops(config: Config) -> list[int]:
    """Updates after which contenders pause: the first, then twice a turn."""
    bench = config.benchmark
    turns = [bench.warmup_steps, bench.steps] * bench.repeats
    return list(itertools.accumulate(turns, initial=1))


def write_configs(config: Config, folder: Path) -> None:
    """Our own configuration for the task, plain and fast."""
    (folder / "plain.json").write_bytes(to_json(_ours(config, fast=False)))
    (folder / "fast.json").write_bytes(to_json(_ours(config, fast=True)))


def _ours(config: Config, *, fast: bool) -> Config:
    training = msgspec.structs.replace(
        config.training,
        steps=_stops(config)[-1] + 1,
        eval_every_steps=0,
        save_every_steps=0,
    )
    rule = msgspec.structs.replace(
        config.optimizer, name="adamw", warmup_steps=0, final_fraction=1.0
    )
    config = msgspec.structs.replace(
        config, training=training, optimizer=rule, device="cpu", mesh=MeshConfig()
    )
    if not fast:
        return config
    presets = paths.project_root() / "projects" / "configs"
    preset = load_config("cpu-fast", {}, presets)
    return msgspec.structs.replace(
        config,
        training=msgspec.structs.replace(training, fast_math=preset.training.fast_math),
    )


class Racer:
    """A contender's process, from its start to its first pause.

    Args:
        contender: which.
        folder: with its task, and our configurations.
        python: the interpreter of the peers' environment.
        cache: where ours keeps compiled steps; None: nowhere else but here.
    """

    def __init__(
        self, contender: Contender, folder: Path, python: Path, cache: Path | None = None
    ) -> None:
        ours = contender.module == "ours"
        words = [sys.executable if ours else str(python), "-m", f"{_HERE}.{contender.module}"]
        words.append(str(folder / contender.data))
        if ours:
            words.append(str(folder / ("fast.json" if contender.fast else "plain.json")))
        name = f"{contender.data}-{contender.module}-{'-'.join(contender.words)}{contender.fast}"
        self.contender, self._log = contender, folder / f"{name}.log"
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TF": "0"}
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache or folder / name)} if ours else {}
        ours_alone = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
        inherited = {k: v for k, v in as_they_come().items() if ours or k not in ours_alone}
        root = {"PYTHONPATH": str(paths.project_root())}
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*words, *contender.words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**inherited, **quiet, **compiled, **root},
                text=True,
            )
        try:
            heard = self._heard()
            self._at, self.compiling = int(heard["step"]), float(heard["compiling"])
        except BaseException:  # a signal too: nobody else knows of the process yet
            self.stop()
            raise
        self.first = time.perf_counter() - self.started
        self._peak_mb = 0.0
        self._rates: list[float] = []
        self._steps: list[float] = []

    def turn(self) -> tuple[float, float, int]:
        """Let it train to its next pause: seconds, useful tokens, updates."""
        self._speak()
        heard = self._heard()
        self._peak_mb = heard["peak_mb"]
        self.compiling += heard["compiling"]
        updates, self._at = heard["step"] - self._at, int(heard["step"])
        return heard["seconds"], heard["useful"], int(updates)

    def timed(self) -> None:
        """A turn that counts, but for its first steps.

        A trainer does not pause, so what a pause costs is not its: Linux gives memory that a
        step has freed to others meanwhile, or back to a virtual machine's host.
        """
        self.turn()
        seconds, useful, updates = self.turn()
        self._rates.append(useful / seconds)
        self._steps.append(seconds / updates)

    def finish(self) -> Result:
        """Its last update, and what it told."""
        self._speak()
        heard = self._heard()
        rates, steps = self._rates, self._steps
        return Result(self.contender, self.first, rates, steps, self._peak_mb, heard["losses"])

    def stop(self) -> None:
        """End its process, in whatever state."""
        self._process.kill()
        self._process.communicate()

    def _failed(self) -> BenchmarkError:
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        code = self._process.wait()
        return BenchmarkError(f"{self.contender.name} failed, exit code {code}: {''.join(last)}")

    def _speak(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        heard: dict[str, Any] = json.loads(line)
        return heard
