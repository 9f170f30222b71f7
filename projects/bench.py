"""Measure this machine: training throughput on a real dataset, or the catalog.

    mlflow run . -e bench --env-manager local
    tunix-mlflow bench column-addition benchmark.repeats=5
    tunix-mlflow bench suite=data benchmark.traces=100000

Half a minute on two cores; the suite data, with its million traces, some minutes. The last line
of stdout is JSON.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunix_mlflow import bootstrap
from tunix_mlflow.config import Config
from tunix_mlflow.errors import ConfigError

from . import console

OWN = ("suite",)
DEFAULT = "column-addition"


def bench(config: Config) -> dict[str, Any]:
    """Run `config.benchmark.suite` and record it.

    Raises:
        InputError: for a dataset or device that cannot be used.
    """
    suites = {"train": _train, "data": _data, "peers": _peers}
    return suites[config.benchmark.suite](config)


def _data(config: Config) -> dict[str, Any]:
    from tunix_mlflow import state
    from tunix_mlflow.benchmarks import data as suite
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.session import session

    store.connect(config.tracking)
    state.temporary_dir().mkdir(parents=True, exist_ok=True)
    with (
        session(config, stage="bench") as run,
        tempfile.TemporaryDirectory(dir=state.temporary_dir()) as folder,
    ):
        sizes = {"traces": config.benchmark.traces, "peer_traces": config.benchmark.peer_traces}
        figures = suite.measure(Path(folder), **sizes, say=console.say)
        run.log_figures({f"data/{name}": value for name, value in figures.items()})
        run.log_text(suite.table(figures), "data.md")
    console.say(suite.table(figures))
    return {"suite": "data", "run_id": run.run_id, **figures}


def _peers(config: Config) -> dict[str, Any]:
    from tunix_mlflow import state
    from tunix_mlflow.benchmarks import compare
    from tunix_mlflow.benchmarks import peers as suite
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.session import session

    python = suite.interpreter(config)
    store.connect(config.tracking)
    state.temporary_dir().mkdir(parents=True, exist_ok=True)
    with (
        session(config, stage="bench") as run,
        tempfile.TemporaryDirectory(dir=state.temporary_dir()) as folder,
    ):
        results = suite.measure(config, Path(folder), python, console.say)
        table = suite.table(results)
        run.log_text(table, "peers.md")
        figures: dict[str, float] = {}
        for result in results:
            for number, rate in enumerate(result.useful_per_sec, start=1):
                run.write_scalars(number, {f"{compare.REPEATS}{result.key}_per_sec": rate})
            figures |= result.figures()
        run.log_figures({f"peers/{name}": value for name, value in figures.items()})
    console.say(table)
    return {"suite": "peers", "run_id": run.run_id, **figures}


def _train(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import compare
    from tunix_mlflow.benchmarks import train as suite
    from tunix_mlflow.data import datasets
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.session import session
    from tunix_mlflow.training import devices
    from tunix_mlflow.training import setup as setups

    if config.dataset is None:
        raise ConfigError("dataset is missing; give dataset=KEY")
    store.connect(config.tracking)
    manifest = datasets.ready(config.dataset, console.say)
    setup = setups.assemble(config, manifest, devices.use(config.device))
    config = setup.config
    tags = {f"tunix.{name}": value for name, value in setup.fingerprint().items()}
    with session(config, stage="bench", tags=tags) as run:
        run.log_dataset(manifest, config.data.train_split, usage="benchmark")
        measured = suite.measure(
            config.benchmark,
            setup.state,
            setup.train_batches(),
            model=config.model,
            plan=setup.plan,
        )
        figures = {k: v for k, v in measured._asdict().items() if isinstance(v, float)}
        run.log_figures({f"perf/{name}": value for name, value in figures.items()})
        for key, values in (
            (f"{compare.REPEATS}tokens_per_sec", measured.tokens_per_secs),
            (f"{compare.REPEATS}step_time_ms", measured.step_times_ms),
            ("perf/single_step_ms", measured.steps_ms),
        ):
            for number, value in enumerate(values, start=1):
                run.write_scalars(number, {key: value})
    low, high = min(measured.tokens_per_secs), max(measured.tokens_per_secs)
    console.say(
        f"{measured.tokens_per_sec:,.0f} tokens/s ({low:,.0f} to {high:,.0f}),"
        f" {measured.step_time_ms:.1f} ms a step (95 % below {measured.step_p95_ms:.1f}), the first"
        f" {measured.compile_seconds:.1f} s; {measured.mfu:.0%} of {measured.gemm_peak_gflops:,.0f}"
        f" GFLOP/s, which a large product reaches; {measured.peak_host_mb:,.0f} MB"
    )
    return {
        "suite": config.benchmark.suite,
        "dataset": manifest.key,
        "device": str(setup.device),
        "run_id": run.run_id,
        **measured._asdict(),
    }


def main(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    arguments = bootstrap.parse(argv, OWN)
    if "suite" in arguments.stage:
        arguments.overrides.setdefault("benchmark.suite", arguments.stage["suite"])
    peers = arguments.overrides.get("benchmark.suite") == "peers"
    config = arguments.load("shape-s" if peers else DEFAULT)
    bootstrap.prepare(config)
    console.result(**bench(config))


if __name__ == "__main__":
    sys.exit(bootstrap.execute(main, sys.argv[1:]))
