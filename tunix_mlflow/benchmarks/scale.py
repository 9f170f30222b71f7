"""Suite `scale`: what a step needs on 1 to 64 devices, as the compiler sees it. A forecast.

The step is compiled for virtual devices and never run: bytes and floating-point operations of a
device, collectives and their bytes. Nothing here is a throughput. Each count of devices has a
process of its own, since jax counts them once; rows per device stay the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from tunix_mlflow.config.identity import to_json
from tunix_mlflow.config.load import from_json
from tunix_mlflow.config.schema import Config, MeshConfig
from tunix_mlflow.errors import BenchmarkError

COUNTS = (1, 2, 4, 8, 16, 32, 64)
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s64": 8, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class Forecast(NamedTuple):
    """Of one device."""

    axis: str  # data, or fsdp
    devices: int
    state_bytes: int  # parameters and optimizer state
    working_bytes: int  # what the step needs besides
    flops: float  # of an update
    collectives: dict[str, int]  # kind -> how many
    collective_bytes: int  # that they give a device, of an update

    def kinds(self) -> str:
        """The collectives in words."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(self.collectives.items())) or "none"


def measure(config: Config, say: Callable[[str], None]) -> list[Forecast]:
    """Compile for every count of devices, along either axis.

    Args:
        config: model, optimizer and `training` are read; `training.batch_size` is a device's, in
            one pass, with all logits at once.
        say: receives one-line messages.

    Raises:
        BenchmarkError: if a compilation fails, with its last words.
    """
    found = []
    for axis in ("data", "fsdp"):
        for count in COUNTS:
            if axis == "fsdp" and count == 1:
                continue
            found.append(_compile(config, axis, count))
            say(line(found[-1]))
    return found


def line(forecast: Forecast) -> str:
    """One forecast in words."""
    f = forecast
    return (
        f"{f.axis} {f.devices}: {f.state_bytes / 1e6:,.1f} MB of state and"
        f" {f.working_bytes / 1e6:,.1f} MB besides on a device, {f.flops / 1e9:,.2f} GFLOP;"
        f" collectives: {f.kinds()}, {f.collective_bytes / 1e6:,.1f} MB"
    )


def table(forecasts: Sequence[Forecast]) -> str:
    """The forecasts as Markdown."""
    rows = [
        "A forecast of the compiler's, per device and update; not a throughput.",
        "",
        "| axis | devices | state MB | working MB | GFLOP | collectives | their MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in forecasts:
        rows.append(
            f"| {f.axis} | {f.devices} | {f.state_bytes / 1e6:,.1f} | {f.working_bytes / 1e6:,.1f}"
            f" | {f.flops / 1e9:,.2f} | {f.kinds()} | {f.collective_bytes / 1e6:,.1f} |"
        )
    return "\n".join(rows)


def collectives(text: str) -> tuple[dict[str, int], int]:
    """How many of each kind a compiled module has, and the bytes of their results."""
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


def _compile(config: Config, axis: str, count: int) -> Forecast:
    mesh = MeshConfig(**{axis: count})
    rows = config.training.batch_size
    # One pass, without a loop: the compiler counts what is in one once.
    training = msgspec.structs.replace(
        config.training,
        batch_size=rows * count,
        microbatch_size=rows,
        loss_chunk=0,
        scan_layers=False,
    )
    config = msgspec.structs.replace(config, mesh=mesh, training=training, device="cpu")
    words = [sys.executable, "-m", "tunix_mlflow.benchmarks.scale", axis]
    done = subprocess.run(
        words,
        input=to_json(config).decode(),
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise BenchmarkError(f"{axis}={count} was not compiled: {''.join(last)}")
    return Forecast(**json.loads(done.stdout))


def _main() -> None:
    import jax

    from tunix_mlflow.input import batches
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.training import mesh as meshes
    from tunix_mlflow.training import setup
    from tunix_mlflow.training.step import train_step

    config = from_json(sys.stdin.buffer.read(), "stdin")
    vocabulary, length = config.benchmark.vocabulary, config.data.sequence_length or 256
    config = setup.resolve_auto(config, vocabulary, "cpu")
    device = devices.use("cpu")
    spec = setup.step_spec(config, vocabulary, device)
    state, _ = setup.abstract(spec, config, vocabulary, device)
    rows = None if spec.mesh is None else jax.sharding.NamedSharding(spec.mesh, meshes.ROWS)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows),
        batches.blank(config.training.batch_size, length),
    )
    compiled = train_step.lower(state, batch, spec=spec).compile()
    memory: Any = compiled.memory_analysis()
    operations: Any = compiled.cost_analysis()
    kinds_found = collectives(compiled.as_text() or "")
    own = sum(_part(leaf) for leaf in jax.tree.leaves(state))
    forecast = Forecast(
        sys.argv[1],
        config.mesh.size,
        own,
        int(memory.temp_size_in_bytes),
        float(operations["flops"]),
        *kinds_found,
    )
    print(json.dumps(forecast._asdict()))


def _part(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    size = 1
    for dimension in shape:
        size *= dimension
    return size * int(leaf.dtype.itemsize)


if __name__ == "__main__":
    _main()
