"""Suite `peers`: the same shape on the same data by several trainers, taking turns.

Each is a process of its own, with the same weights to begin with, the same batches, float32 and
the same optimizer (AdamW, constant rate, gradients clipped by their global norm). Rows are full
(`full`), or hold documents of lognormal length with a median of 80 tokens (`mix`), one per row
where the trainer does not pack. What counts is useful tokens: those that are not padding.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tunix_mlflow import paths
from tunix_mlflow.benchmarks import workload
from tunix_mlflow.benchmarks.peer_process import Peer, PeerProcess, PeerResult
from tunix_mlflow.benchmarks.trainers import task as tasks
from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import Config, MeshConfig
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.models import decoder
from tunix_mlflow.models.hub import names
from tunix_mlflow.runtime import environment

OURS = Peer("ours", "full", "ours", ("padded",))
PEFT_TRAINER = Peer("PeftTrainer", "full", "peft_trainer")
PEERS = (
    OURS,
    Peer("ours, cpu-fast", "full", "ours", ("padded",), fast=True),
    PEFT_TRAINER,
    Peer("HF Trainer", "full", "hugging_face", ("trainer",)),
    Peer("ours, packed", "mix", "ours", ("packed",)),
    Peer("ours, packed, cpu-fast", "mix", "ours", ("packed",), fast=True),
    Peer("ours, one a row", "mix", "ours", ("padded",)),
    Peer("PeftTrainer", "mix", "peft_trainer"),
    Peer("HF Trainer", "mix", "hugging_face", ("trainer",)),
    Peer("SFTTrainer", "mix", "hugging_face", ("sft",)),
    Peer("SFTTrainer, packed", "mix", "hugging_face", ("sft-packed",)),
)
_COMPARED = ("PeftTrainer", "HF Trainer")
"""Trainers that the table compares each one with."""


def measure(
    config: Config, folder: Path, python: Path, report: Callable[[str], None]
) -> list[PeerResult]:
    """Let all trainers train, in turns.

    Args:
        config: model, optimizer, batch size, sequence length and `benchmark` are read.
        folder: an empty one, for the tasks and what the trainers print.
        python: the interpreter of the peers' environment.
        report: receives one-line messages.

    Raises:
        BenchmarkError: if a trainer fails, with the last line of its output.
    """
    bench = config.benchmark
    wanted = [p for p in PEERS if bench.data in ("all", p.rows) and p.fast <= bench.cpu_fast]
    for rows in {peer.rows for peer in wanted}:
        (folder / rows).mkdir()
        tasks.write(folder / rows, task(config, rows))
    write_configs(config, folder)
    processes: list[PeerProcess] = []
    try:
        for peer in wanted:
            processes.append(PeerProcess(peer, folder, python))
            seconds = processes[-1].first_step_seconds
            report(f"{peer.rows}, {peer.name}: first step after {seconds:.1f} s")
        for repeat in range(bench.repeats):
            for process in processes if repeat % 2 == 0 else reversed(processes):
                process.timed_turn()
            report(f"repeat {repeat + 1} of {bench.repeats}")
        return [process.finish() for process in processes]
    finally:
        for process in processes:
            process.stop()


def table(results: Sequence[PeerResult]) -> str:
    """Return the results as Markdown; ratios are medians of paired repeats."""
    ratios = " | ".join(f"ratio to {name}" for name in _COMPARED)
    lines = [
        f"| rows | trainer | useful tokens/s | {ratios} | seconds per step"
        " | first step, s | peak MB | first loss | last loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rates = result.useful_per_sec
        shown = [
            "" if r is None else f"{r:.2f}" for r in (ratio(results, result, n) for n in _COMPARED)
        ]
        lines.append(
            f"| {result.peer.rows} | {result.peer.name}"
            f" | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            f" | {shown[0]} | {shown[1]} | {statistics.median(result.step_seconds):.2f}"
            f" | {result.first_step_seconds:.1f} | {result.peak_mb:,.0f}"
            f" | {result.losses[0]:.4f} | {result.losses[-1]:.4f} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[PeerResult], path: Path) -> None:
    """Draw useful tokens per second: medians as bars, repeats as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r.peer.name} ({r.peer.rows})" for r in results]
    medians = [statistics.median(r.useful_per_sec) for r in results]
    colours = ["C0" if r.peer.is_ours else "lightgrey" for r in results]
    axes.barh(labels, medians, color=colours)
    for label, result in zip(labels, results, strict=True):
        rates = result.useful_per_sec
        axes.plot(rates, [label] * len(rates), ".", color="black", markersize=3)
    axes.invert_yaxis()
    axes.set(xlabel="useful tokens/s; dots: repeats")
    figure.savefig(path, dpi=120)


def ratio(results: Sequence[PeerResult], result: PeerResult, name: str) -> float | None:
    """Return its useful tokens per second over those of a trainer on the same rows.

    Returns:
        The median of paired repeats; None if that trainer is not among the results.
    """
    for other in results:
        if other.peer.name == name and other.peer.rows == result.peer.rows:
            pairs = zip(result.useful_per_sec, other.useful_per_sec, strict=True)
            return statistics.median(a / b for a, b in pairs)
    return None


def interpreter(config: Config) -> Path:
    """Return the interpreter of the peers' environment.

    Raises:
        ConfigError: if it is missing, with the command that makes it.
    """
    configured = config.benchmark.peers_python
    default = paths.project_root() / ".venv-peers" / "bin" / "python"
    path = Path(configured) if configured else default
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigError(
            f"the peers' environment is missing: no {path}; `make peers` in a checkout builds it,"
            " or set benchmark.peers_python"
        )
    return path


def task(config: Config, rows: str) -> tasks.Task:
    """Return the work on `full` or `mix` rows, for as many updates as `benchmark` says."""
    bench, training, optimizer = config.benchmark, config.training, config.optimizer
    length = config.data.sequence_length or 0
    stops = _stops(config)
    count = (stops[-1] + 1) * training.batch_size
    documents = workload.documents(rows, count, length, bench.vocabulary)
    stream = TrainBatches(
        workload.token_rows(documents, length, packing=False),
        batch_size=training.batch_size,
        seed=config.seed,
    )
    order = [[row[0] for row in stream.rows_at(step)] for step in range(stops[-1] + 1)]
    _, params = decoder.build(config.model, bench.vocabulary, config.seed)
    return tasks.Task(
        model=msgspec.to_builtins(config.model),
        vocab_size=bench.vocabulary,
        length=length,
        batch_size=training.batch_size,
        learning_rate=optimizer.learning_rate,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        threads=int(environment.threads()),
        stops=stops,
        documents=documents,
        order=np.asarray(order, np.int32),
        weights=names.to_names(params, config.model),
    )


def write_configs(config: Config, folder: Path) -> None:
    """Write our own configuration of the task, plain and with the preset cpu-fast."""
    (folder / "plain.json").write_bytes(to_json(_ours(config, fast=False)))
    (folder / "fast.json").write_bytes(to_json(_ours(config, fast=True)))


def _stops(config: Config) -> list[int]:
    """Return the updates after which trainers pause: the first, then two for each turn."""
    bench = config.benchmark
    turns = [bench.warmup_steps, bench.steps] * bench.repeats
    return list(itertools.accumulate(turns, initial=1))


def _ours(config: Config, *, fast: bool) -> Config:
    preset = load_config("cpu-fast") if fast else config
    training = msgspec.structs.replace(
        config.training,
        steps=_stops(config)[-1] + 1,
        eval_every_steps=0,
        save_every_steps=0,
        fast_math=preset.training.fast_math,
    )
    optimizer = msgspec.structs.replace(
        config.optimizer, name="adamw", warmup_steps=0, final_fraction=1.0
    )
    return msgspec.structs.replace(
        config, training=training, optimizer=optimizer, device="cpu", mesh=MeshConfig()
    )
