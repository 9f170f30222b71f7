"""Suite `scale`: what a step needs on 1 to 64 devices, as the compiler sees it. A forecast.

The step is compiled for virtual devices and never run: bytes and floating-point operations of a
device, collectives and their bytes. Nothing here is a throughput. A process of its own compiles,
with as many virtual devices as the largest mesh needs; rows per device stay the same.

    python -m tunix_mlflow.benchmarks.scale COUNT...      # what the child process runs
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.load import from_json
from tunix_mlflow.config.schema import Config, MeshConfig
from tunix_mlflow.errors import BenchmarkError

COUNTS = (1, 2, 4, 8, 16, 32, 64)
_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
"""The program is never run, so LLVM need not optimize it; this changes no figure of a forecast."""
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s64": 8, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class Forecast(NamedTuple):
    """What one device needs."""

    axis: str  # data, or fsdp
    devices: int
    state_bytes: int  # parameters and optimizer state
    working_bytes: int  # what the step needs in addition
    flops: float  # of an update
    collectives: dict[str, int]  # kind -> how many
    collective_bytes: int  # of their results, per update

    def kinds(self) -> str:
        """Return the collectives as text."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(self.collectives.items())) or "none"


def measure(config: Config, report: Callable[[str], None]) -> list[Forecast]:
    """Compile for every count of devices, along either axis.

    Args:
        config: model, optimizer and `training` are read; `training.batch_size` is the rows of one
            device, in one pass, with all logits at once.
        report: receives one line for each forecast.

    Raises:
        BenchmarkError: if a compilation fails, with the last line of its output.
    """
    # One pass, without a loop: the compiler counts what is in a loop once.
    training = msgspec.structs.replace(
        config.training,
        microbatch_size=config.training.batch_size,
        loss_chunk=0,
        scan_layers=False,
    )
    config = msgspec.structs.replace(config, training=training, device="cpu", mesh=MeshConfig())
    variables = {"JAX_NUM_CPU_DEVICES": str(max(COUNTS)), "JAX_PLATFORMS": "cpu"}
    result = []
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as log:
        source.write(to_json(config))
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "tunix_mlflow.benchmarks.scale", *map(str, COUNTS)],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **variables},
        )
        assert process.stdout is not None
        try:
            for text in process.stdout:
                result.append(Forecast(**json.loads(text)))
                report(line(result[-1]))
            code = process.wait()
        finally:
            process.kill()
            process.communicate()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
    if code:
        raise BenchmarkError(f"compilation {len(result) + 1} failed: {''.join(last)}")
    return result


def line(forecast: Forecast) -> str:
    """Return one forecast in one line."""
    f = forecast
    return (
        f"{f.axis}={f.devices}: {f.state_bytes / 1e6:,.1f} MB of state and"
        f" {f.working_bytes / 1e6:,.1f} MB of working memory per device,"
        f" {f.flops / 1e9:,.2f} GFLOP; collectives: {f.kinds()}, {f.collective_bytes / 1e6:,.1f} MB"
    )


def table(forecasts: Sequence[Forecast]) -> str:
    """Return the forecasts as Markdown."""
    rows = [
        "A forecast by the compiler, per device and update; not a throughput.",
        "",
        "| axis | devices | state MB | working MB | GFLOP | collectives | collective MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in forecasts:
        rows.append(
            f"| {f.axis} | {f.devices} | {f.state_bytes / 1e6:,.1f} | {f.working_bytes / 1e6:,.1f}"
            f" | {f.flops / 1e9:,.2f} | {f.kinds()} | {f.collective_bytes / 1e6:,.1f} |"
        )
    return "\n".join(rows)


def collectives(text: str) -> tuple[dict[str, int], int]:
    """Return how many collectives of each kind a compiled module has, and the bytes of results."""
    kinds: dict[str, int] = {}
    size = 0
    for shapes, kind in _COLLECTIVE.findall(text):
        kinds[kind] = kinds.get(kind, 0) + 1
        for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = 1
            for dimension in filter(None, dimensions.split(",")):
                count *= int(dimension)
            size += count * _BYTES.get(dtype, 4)
    return kinds, size


def forecast(config: Config, axis: str, count: int) -> Forecast:
    """Compile the step for `count` devices along one axis, and read what it needs.

    Args:
        config: `training.batch_size` is the rows of one device.
        axis: of the mesh, data or fsdp.
        count: at most as many as jax has.

    Raises:
        DeviceError: if jax has fewer devices.
    """
    import jax

    from tunix_mlflow.runtime import devices
    from tunix_mlflow.training.resolve import resolve_auto
    from tunix_mlflow.training.spec import step_spec
    from tunix_mlflow.training.state import abstract_state
    from tunix_mlflow.training.trainer import lower_step

    training = msgspec.structs.replace(
        config.training, batch_size=config.training.batch_size * count
    )
    data = msgspec.structs.replace(config.data, sequence_length=config.data.sequence_length or 256)
    config = msgspec.structs.replace(
        config, mesh=MeshConfig(**{axis: count}), training=training, data=data
    )
    vocabulary = config.benchmark.vocabulary
    config = resolve_auto(config, vocabulary, "cpu")
    device = devices.use("cpu")
    spec = step_spec(config, vocabulary, device)
    compiled = lower_step(spec, config, vocabulary, device).compile(_OPTIONS)
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    state, _ = abstract_state(spec, config, vocabulary, device)
    return Forecast(
        axis,
        count,
        sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(state)),
        int(memory.temp_size_in_bytes),
        float(costs["flops"]),
        *collectives(compiled.as_text() or ""),
    )


def _bytes_per_device(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    size = 1
    for dimension in shape:
        size *= dimension
    return size * int(leaf.dtype.itemsize)


def _main() -> None:
    config = from_json(sys.stdin.buffer.read(), "stdin")
    counts = [int(text) for text in sys.argv[1:]]
    for axis in ("data", "fsdp"):
        for count in counts:
            if axis == "data" or count > 1:
                print(json.dumps(forecast(config, axis, count)._asdict()), flush=True)


if __name__ == "__main__":
    _main()
