"""Measure this machine: the training step, what surrounds it, other trainers, the catalog.

Every suite is one run of MLflow with its own parameters, its figures as metrics, and its single
repeats, which `bench compare` reads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunix_mlflow import files, paths
from tunix_mlflow.config.identity import config_digest, flatten
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime.report import SILENT, Reporter

if TYPE_CHECKING:
    from tunix_mlflow.benchmarks.workload import Workload
    from tunix_mlflow.tracking.run import Run

_SHAPE = ("model.layers", "model.width", "model.heads", "model.kv_heads", "model.mlp_width")
_REPEATS = ("benchmark.warmup_steps", "benchmark.steps", "benchmark.repeats")
_STEP = (
    *("seed", "device", "dataset", "base", *_SHAPE, "lora.rank", "mesh.data", "mesh.fsdp"),
    *("data.sequence_length", "data.packing", "optimizer.name"),
    *("training.batch_size", "training.microbatch_size", "training.param_dtype"),
    *("training.compute_dtype", "training.remat", "training.loss_chunk", "training.fused"),
    *("training.scan_layers", "training.fast_math"),
)
_GENERATED = ("seed", *_SHAPE, "data.sequence_length", "training.batch_size")
_PARAMS = {
    "train": (*_STEP, *_REPEATS),
    "tracking": (*_STEP, *_REPEATS[1:], "benchmark.delay_ms"),
    "checkpoint": (*_STEP, *_REPEATS[1:]),
    "data": ("benchmark.traces", "benchmark.peer_traces"),
    "peers": (*_GENERATED, *_REPEATS, "benchmark.vocabulary", "benchmark.data"),
    "startup": (*_GENERATED, "benchmark.vocabulary", "benchmark.repeats"),
    "scale": (*_GENERATED[1:], "optimizer.name", "training.param_dtype", "benchmark.vocabulary"),
}
"""The keys of the configuration that a suite reads, and its run records where they are set."""


def run(config: Config, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Run the suite `config.benchmark.suite`, and record it as a run of MLflow.

    Args:
        config: see `benchmark` for what the suites read.
        reporter: receives progress and a summary.

    Returns:
        `suite`, `run_id`, and the suite's figures.

    Raises:
        InputError: for a dataset, device, server or environment that cannot be used.
        BenchmarkError: when what is measured fails.
    """
    suites: dict[str, Callable[[Config, Reporter], dict[str, Any]]] = {
        "train": _train,
        "data": _data,
        "peers": _peers,
        "tracking": _tracking,
        "checkpoint": _checkpoint,
        "startup": _startup,
        "scale": _scale,
    }
    suite = config.benchmark.suite
    return {"suite": suite, **suites[suite](config, reporter)}


def _train(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import train

    workload = _workload(config, reporter)
    with _recorded(workload.config, reporter, workload) as (run, _):
        profile = run.folder / "profile" if config.benchmark.profile else None
        with train.profiled(profile):
            result = train.measure(workload)
        if profile is not None:
            run.log_artifacts(str(profile), "profile")
        figures = {k: v for k, v in result._asdict().items() if isinstance(v, float)}
        run.log_metrics({f"perf/{name}": value for name, value in figures.items()})
        _log_repeats(
            run, {"tokens_per_sec": result.tokens_per_secs, "step_time_ms": result.step_times_ms}
        )
        for step, value in enumerate(result.steps_ms, start=1):
            run.log_metrics({"perf/single_step_ms": value}, step)
        train.plot(result.steps_ms, run.folder / "steps.png")
        run.log_artifact(str(run.folder / "steps.png"))
        run.sync()
    reporter.info(train.summary(result))
    return {
        "dataset": config.dataset,
        "device": str(workload.device),
        "run_id": run.run_id,
        **result._asdict(),
    }


def _tracking(config: Config, reporter: Reporter) -> dict[str, Any]:
    import mlflow

    from tunix_mlflow.benchmarks import tracking

    uri, delay = mlflow.get_tracking_uri(), config.benchmark.delay_ms
    if delay and (config.tracking.offline or not uri.startswith("http://")):
        raise ConfigError(
            f"benchmark.delay_ms needs a tracking server at http://, and this is {uri}"
        )
    workload = _workload(config, reporter)
    server = tracking.delayed_server(uri, delay) if delay else nullcontext(uri)
    with server as address:
        mlflow.set_tracking_uri(address)
        other_threads = tracking.thread_ids()
        try:
            with _recorded(workload.config, reporter, workload) as (run, _):
                cost = tracking.measure(workload, run, run.sync, other_threads)
                repeats = {"step_ms": cost.step_ms, "recorded_step_ms": cost.recorded_step_ms}
                figures = _log_cost(run, "tracking", cost._asdict(), repeats)
        finally:
            mlflow.set_tracking_uri(uri)
    reporter.info(tracking.summary(cost))
    return {"run_id": run.run_id, **figures}


def _checkpoint(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import checkpoint

    workload = _workload(config, reporter)
    with _recorded(workload.config, reporter, workload) as (run, folder):
        cost = checkpoint.measure(workload, folder / "checkpoints")
        figures = _log_cost(run, "checkpoint", cost._asdict(), {"step_ms": cost.step_ms})
    reporter.info(checkpoint.summary(cost))
    return {"run_id": run.run_id, **figures}


def _data(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import data

    with _recorded(config, reporter) as (run, folder):
        figures = data.measure(
            folder,
            traces=config.benchmark.traces,
            peer_traces=config.benchmark.peer_traces,
            report=reporter.info,
        )
        run.log_metrics({f"data/{name}": value for name, value in figures.items()})
        run.log_text(data.table(figures), "data.md")
    reporter.info(data.table(figures))
    return {"run_id": run.run_id, **figures}


def _peers(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import peers

    python = peers.interpreter(config)
    with _recorded(config, reporter) as (run, folder):
        results = peers.measure(config, folder, python, reporter.info)
        peers.plot(results, run.folder / "peers.png")
        run.log_artifact(str(run.folder / "peers.png"))
        run.log_text(peers.table(results), "peers.md")
        _log_repeats(run, {f"{each.peer.key}_per_sec": each.useful_per_sec for each in results})
        figures = {name: value for each in results for name, value in each.figures().items()}
        run.log_metrics({f"peers/{name}": value for name, value in figures.items()})
        run.sync()
    reporter.info(peers.table(results))
    return {"run_id": run.run_id, **figures}


def _startup(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import peers, startup

    try:
        python: Path | None = peers.interpreter(config)
    except ConfigError as error:
        if config.benchmark.peers_python:
            raise
        python = None
        reporter.info(f"without PeftTrainer: {error}")
    with _recorded(config, reporter) as (run, folder):
        repeats = startup.measure(config, folder, python, reporter.info)
        run.log_text(startup.table(repeats), "startup.md")
        figures = _log_cost(run, "startup", {}, repeats)
    reporter.info(startup.table(repeats))
    return {"run_id": run.run_id, **figures}


def _scale(config: Config, reporter: Reporter) -> dict[str, Any]:
    from tunix_mlflow.benchmarks import scale

    with _recorded(config, reporter) as (run, _):
        forecasts = scale.measure(config, reporter.info)
        run.log_text(scale.table(forecasts), "scale.md")
        for each in forecasts:
            values = {
                "state_bytes": each.state_bytes,
                "working_bytes": each.working_bytes,
                "gflop": each.flops / 1e9,
                "collective_bytes": each.collective_bytes,
            }
            metrics = {f"scale/{each.axis}/{name}": float(v) for name, v in values.items()}
            run.log_metrics(metrics, each.devices)
        run.sync()
    return {"run_id": run.run_id, "forecasts": [each._asdict() for each in forecasts]}


@contextmanager
def _recorded(
    config: Config, reporter: Reporter, workload: Workload | None = None
) -> Iterator[tuple[Run, Path]]:
    """Open a run for a suite, and an empty folder for its work."""
    from tunix_mlflow.tracking.run import open_run
    from tunix_mlflow.tracking.tags import CONFIG_DIGEST

    suite = config.benchmark.suite
    tags = {CONFIG_DIGEST: config_digest(config)}
    if workload is not None:
        tags |= workload.environment_tags()
    with (
        open_run(
            stage="bench",
            tracking=config.tracking,
            name=f"bench {suite}",
            tags=tags,
            report=reporter.info,
        ) as run,
        files.scratch(paths.temporary_dir()) as folder,
    ):
        run.log_params(_params(config, generated=workload is not None and not config.dataset))
        if workload is not None and workload.manifest is not None:
            from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset

            dataset = TunixMlflowDataset(workload.manifest, config.data.train_split)
            run.log_input(dataset, context="benchmark")
        yield run, folder


def _params(config: Config, *, generated: bool) -> dict[str, Any]:
    """Return what the suite reads of the configuration, without what is not set."""
    suite, values = config.benchmark.suite, flatten(config)
    keys = _PARAMS[suite]
    if generated:
        keys = (*keys, "benchmark.data", "benchmark.vocabulary")
    selected = {key: values[key] for key in keys if values[key] is not None}
    return {"benchmark.suite": suite, **selected}


def _workload(config: Config, reporter: Reporter) -> Workload:
    """Return what is trained: a dataset, or generated documents."""
    from tunix_mlflow.runtime import environment

    environment.require(config)  # before jax is loaded
    from tunix_mlflow.benchmarks import workload
    from tunix_mlflow.data import datasets
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.tracking import artifacts

    device = devices.use(config.device)
    with artifacts.base(config) as base:
        if config.dataset is None:
            return workload.generated(config, device, base)
        manifest = datasets.ready(config.dataset, reporter.info)
        return workload.from_dataset(config, manifest, device, base)


def _log_repeats(run: Run, values: Mapping[str, Sequence[float]]) -> None:
    from tunix_mlflow.benchmarks.compare import REPEATS

    for name, repeats in values.items():
        for step, value in enumerate(repeats, start=1):
            run.log_metrics({f"{REPEATS}{name}": value}, step)


def _log_cost(
    run: Run, prefix: str, cost: Mapping[str, Any], repeats: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Log figures and medians of repeats; return them, with the repeats."""
    figures = {name: value for name, value in cost.items() if isinstance(value, float)}
    figures |= {name: statistics.median(values) for name, values in repeats.items()}
    run.log_metrics({f"{prefix}/{name}": value for name, value in figures.items()})
    _log_repeats(run, repeats)
    run.sync()
    return {**figures, "repeats": {name: list(values) for name, values in repeats.items()}}
