"""Measure this machine: the training step, what surrounds it, other trainers, the catalog.

    mlflow run . -e bench --env-manager local
    tunix-mlflow bench column-addition benchmark.repeats=5
    tunix-mlflow bench shape-s suite=tracking
    tunix-mlflow bench suite=data benchmark.traces=100000

Half a minute on two cores; the suites data and peers some minutes. The last line of stdout is
JSON.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunix_mlflow.cli.arguments import parse
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime import process
from tunix_mlflow.runtime.environment import prepare

from . import console

if TYPE_CHECKING:
    from tunix_mlflow.benchmarks.workload import Work
    from tunix_mlflow.tracking.run import RunSession

OWN = ("suite",)
TRAIN, OTHERS = "column-addition", "shape-s"  # presets of the suite train, and of the others


def bench(config: Config) -> dict[str, Any]:
    """Run `config.benchmark.suite` and record it.

    Raises:
        InputError: for a dataset, device, server or environment that cannot be used.
        BenchmarkError: when what is measured fails.
    """
    suites: dict[str, Callable[[Config], dict[str, Any]]] = {
        "train": _train,
        "data": _data,
        "peers": _peers,
        "tracking": _tracking,
        "checkpoint": _checkpoint,
        "startup": _startup,
        "scale": _scale,
    }
    return {"suite": config.benchmark.suite, **suites[config.benchmark.suite](config)}


def _data(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import data as suite

    with _recorded(config) as (run, folder):
        sizes = {"traces": config.benchmark.traces, "peer_traces": config.benchmark.peer_traces}
        figures = suite.measure(folder, **sizes, say=console.say)
        run.log_figures({f"data/{name}": value for name, value in figures.items()})
        run.log_text(suite.table(figures), "data.md")
    console.say(suite.table(figures))
    return {"run_id": run.run_id, **figures}


def _peers(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import peers as suite

    python = suite.interpreter(config)
    with _recorded(config) as (run, folder):
        results = suite.measure(config, folder, python, console.say)
        suite.plot(results, run.folder / "peers.png")
        run.log_file(run.folder / "peers.png")
        run.log_text(suite.table(results), "peers.md")
        _log_repeats(run, {f"{result.key}_per_sec": result.useful_per_sec for result in results})
        figures = {name: value for result in results for name, value in result.figures().items()}
        run.log_figures({f"peers/{name}": value for name, value in figures.items()})
        run.sync()
    console.say(suite.table(results))
    return {"run_id": run.run_id, **figures}


def _train(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import train as suite

    work = _workload(config)
    config = work.config
    with _recorded(config, work.tags()) as (run, _):
        if work.manifest is not None:
            run.log_dataset(work.manifest, config.data.train_split, usage="benchmark")
        profile = run.folder / "profile" if config.benchmark.profile else None
        with suite.profiled(profile):
            measured = suite.measure(
                config.benchmark,
                work.state,
                work.batches,
                model=config.model,
                spec=work.spec,
                frozen=work.frozen,
            )
        if profile is not None:
            run.log_folder(profile, "profile")
        figures = {k: v for k, v in measured._asdict().items() if isinstance(v, float)}
        run.log_figures({f"perf/{name}": value for name, value in figures.items()})
        rates, times = measured.tokens_per_secs, measured.step_times_ms
        _log_repeats(run, {"tokens_per_sec": rates, "step_time_ms": times})
        for number, value in enumerate(measured.steps_ms, start=1):
            run.write_scalars(number, {"perf/single_step_ms": value})
        suite.plot(measured.steps_ms, run.folder / "steps.png")
        run.log_file(run.folder / "steps.png")
        run.sync()
    low, high = min(measured.tokens_per_secs), max(measured.tokens_per_secs)
    console.say(
        f"{measured.tokens_per_sec:,.0f} tokens/s ({low:,.0f} to {high:,.0f}),"
        f" {measured.step_time_ms:.1f} ms a step (95 % below {measured.step_p95_ms:.1f}), the first"
        f" {measured.compile_seconds:.1f} s; {measured.mfu:.0%} ({min(measured.mfus):.0%} to"
        f" {max(measured.mfus):.0%}) of {measured.gemm_peak_gflops:,.0f} GFLOP/s, which a large"
        f" product reaches; {measured.peak_host_mb:,.0f} MB"
    )
    return {
        "dataset": config.dataset,
        "device": str(work.device),
        "run_id": run.run_id,
        **measured._asdict(),
    }


def _tracking(config: Config) -> dict[str, Any]:
    import mlflow

    from tunix_mlflow.benchmarks import tracking as suite

    work = _workload(config)
    uri = mlflow.get_tracking_uri()
    if config.benchmark.delay_ms and (config.tracking.offline or not uri.startswith("http://")):
        raise ConfigError(
            f"benchmark.delay_ms needs a tracking server at http://, and this is {uri}"
        )
    later = suite.away(uri, config.benchmark.delay_ms)
    with later if config.benchmark.delay_ms else nullcontext(uri) as address:
        mlflow.set_tracking_uri(address)
        try:
            with _recorded(work.config, work.tags()) as (run, _):
                cost = suite.measure(
                    config.benchmark,
                    work.spec,
                    work.state,
                    work.batches,
                    run,
                    run.sync,
                    work.frozen,
                )
                repeats = {"step_ms": cost.step_ms, "recorded_step_ms": cost.recorded_step_ms}
                figures = _log_cost(run, "tracking", cost._asdict(), repeats)
        finally:
            mlflow.set_tracking_uri(uri)
    console.say(
        f"a step takes {statistics.median(cost.step_ms):.1f} ms, recorded"
        f" {statistics.median(cost.recorded_step_ms):.1f}: {cost.share:+.2%} (median of pairs)."
        f" Accounted for: {cost.write_ms:.3f} ms in the loop and {cost.delivery_ms:.3f} ms of"
        f" processor time to deliver, {cost.accounted_share:.2%}"
    )
    return {"run_id": run.run_id, **figures}


def _checkpoint(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import checkpoint as suite

    work = _workload(config)
    with _recorded(work.config, work.tags()) as (run, folder):
        cost = suite.measure(
            config.benchmark, work.spec, work.state, work.batches, folder / "c", work.frozen
        )
        figures = _log_cost(run, "checkpoint", cost._asdict(), {"step_ms": cost.step_ms})
    low, high = min(cost.extra_ms), max(cost.extra_ms)
    console.say(
        f"a save of {cost.megabytes:,.1f} MB blocks {cost.blocked_ms:.0f} ms, costs"
        f" {statistics.median(cost.extra_ms):.0f} ms in all ({low:.0f} to {high:.0f}), counts after"
        f" {cost.sealed_ms:.0f} ms; {cost.share:.2%} of {suite.EVERY} steps of"
        f" {statistics.median(cost.step_ms):.0f} ms. Checked in {cost.verify_ms:.0f} ms,"
        f" restored in {cost.restore_ms:.0f}"
    )
    return {"run_id": run.run_id, **figures}


def _startup(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import peers
    from tunix_mlflow.benchmarks import startup as suite

    try:
        python: Path | None = peers.interpreter(config)
    except ConfigError as error:
        if config.benchmark.peers_python:
            raise
        python = None
        console.say(f"without PeftTrainer: {error}")
    with _recorded(config) as (run, folder):
        found = suite.measure(config, folder, python, console.say)
        run.log_text(suite.table(found), "startup.md")
        figures = _log_cost(run, "startup", {}, found)
    console.say(suite.table(found))
    return {"run_id": run.run_id, **figures}


def _scale(config: Config) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import scale as suite

    with _recorded(config) as (run, _):
        found = suite.measure(config, console.say)
        run.log_text(suite.table(found), "scale.md")
        for f in found:
            values = {
                "state_bytes": f.state_bytes,
                "working_bytes": f.working_bytes,
                "gflop": f.flops / 1e9,
                "collective_bytes": f.collective_bytes,
            }
            run.write_scalars(f.devices, {f"scale/{f.axis}/{k}": v for k, v in values.items()})
        run.sync()
    return {"run_id": run.run_id, "forecasts": [f._asdict() for f in found]}


@contextmanager
def _recorded(
    config: Config, tags: Mapping[str, str] | None = None
) -> Iterator[tuple[RunSession, Path]]:
    """A run for a suite, and an empty folder for its work."""
    from tunix_mlflow import paths
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.run import session

    store.connect(config.tracking)
    paths.temporary_dir().mkdir(parents=True, exist_ok=True)
    with (
        session(config, stage="bench", tags=tags or {}) as run,
        tempfile.TemporaryDirectory(dir=paths.temporary_dir()) as folder,
    ):
        yield run, Path(folder)


def _workload(config: Config) -> Work:
    """What is trained: of a dataset, or of made-up documents."""
    from tunix_mlflow.benchmarks import workload
    from tunix_mlflow.data import datasets
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.tracking import artifacts

    device = devices.use(config.device)
    with artifacts.base(config) as base:
        if config.dataset is None:
            return workload.made_up(config, device, base)
        manifest = datasets.ready(config.dataset, console.say)
        return workload.of_dataset(config, manifest, device, base)


def _log_repeats(run: RunSession, values: Mapping[str, Sequence[float]]) -> None:
    from tunix_mlflow.benchmarks import compare

    for name, repeats in values.items():
        for number, value in enumerate(repeats, start=1):
            run.write_scalars(number, {f"{compare.REPEATS}{name}": value})


def _log_cost(
    run: RunSession, prefix: str, cost: Mapping[str, Any], repeats: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Figures, and medians of repeats, of a suite; what its JSON says."""
    figures = {name: value for name, value in cost.items() if isinstance(value, float)}
    figures |= {name: statistics.median(values) for name, values in repeats.items()}
    run.log_figures({f"{prefix}/{name}": value for name, value in figures.items()})
    _log_repeats(run, repeats)
    run.sync()
    return {**figures, "repeats": {name: list(values) for name, values in repeats.items()}}


def main(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    arguments = parse(argv, OWN)
    if "suite" in arguments.stage:
        arguments.overrides.setdefault("benchmark.suite", arguments.stage["suite"])
    suite = arguments.overrides.get("benchmark.suite", "train")
    config = arguments.load(TRAIN if suite == "train" else OTHERS)
    prepare(config)
    console.result(**bench(config))


if __name__ == "__main__":
    process.run(main)
