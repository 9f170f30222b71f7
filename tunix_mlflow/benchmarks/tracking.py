"""Suite `tracking`: what the record of a step costs the step, with and without, in turns.

Blocks of steps alternate between a loop that records, as training does, and one that does not.
Between blocks MLflow is given the rest, so that nothing is left for the next one to pay; a block
should be some times as long as the shipper's interval, or its last delivery goes uncounted. As
the machine's noise is larger than what is looked for, the cost is also accounted for: the loop's
wait in each write, and the processor time of the threads that deliver.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import jax
import psutil

from tunix_mlflow.config.schema import BenchmarkConfig
from tunix_mlflow.input.batches import TrainBatches
from tunix_mlflow.models.decoder import Params
from tunix_mlflow.training.step import StepSpec, TrainState, train_step
from tunix_mlflow.training.writers import MetricWriter


class Cost(NamedTuple):
    """Of recording a step."""

    step_ms: list[float]  # without, a block each
    recorded_step_ms: list[float]  # with, the block beside it
    share: float  # of a step's time: median of the pairs
    write_ms: float  # the loop waits so long in a step's write
    delivery_ms: float  # processor time a step of the threads that deliver
    accounted_share: float  # both, of a step's processor time


def measure(
    config: BenchmarkConfig,
    spec: StepSpec,
    state: TrainState,
    batches: TrainBatches,
    writer: MetricWriter,
    sync: Callable[[], object],
    frozen: Params | None = None,
) -> Cost:
    """Train `repeats` pairs of blocks of `steps` updates.

    Args:
        config: how many.
        plan: how an update is computed.
        state: donated.
        batches: of each update.
        writer: receives what training would record.
        sync: returns when all of it is delivered.
        frozen: the parameters beside adapters.
    """
    done = 0
    process = psutil.Process()
    write_seconds: list[float] = []

    def block(*, recorded: bool) -> float:
        nonlocal state, done
        begun = time.perf_counter()
        for _ in range(config.steps):
            state, metrics = train_step(state, batches.at(done), frozen, spec=spec)
            done += 1
            loss, norm = float(metrics.loss), float(metrics.grad_norm)
            if recorded:
                scalars = {"train/loss": loss, "train/grad_norm": norm, "train/tokens": 1.0}
                scalars |= {f"perf/{name}": float(done) for name in ("a", "b", "c", "d", "e")}
                at = time.perf_counter()
                writer.write_scalars(done, scalars)
                write_seconds.append(time.perf_counter() - at)
        jax.block_until_ready(state)
        took = time.perf_counter() - begun
        if recorded:
            sync()
        return 1000 * took / config.steps

    block(recorded=True)  # compiles, and opens connections
    write_seconds.clear()
    without: list[float] = []
    with_record: list[float] = []
    delivered, used = _delivery_seconds(process), 0.0
    for repeat in range(config.repeats):
        for recorded in (True, False) if repeat % 2 else (False, True):
            cpu = time.process_time()
            (with_record if recorded else without).append(block(recorded=recorded))
            if not recorded:
                used += time.process_time() - cpu
    delivered = _delivery_seconds(process) - delivered
    steps = config.repeats * config.steps
    write, delivery = statistics.median(write_seconds), delivered / steps
    return Cost(
        without,
        with_record,
        statistics.median(b / a - 1 for a, b in zip(without, with_record, strict=True)),
        1000 * write,
        1000 * delivery,
        (write + delivery) / (used / steps),
    )


@contextmanager
def away(uri: str, milliseconds: float) -> Iterator[str]:
    """The address of a server that answers like `uri`, so much later.

    Args:
        uri: http://host:port.
        milliseconds: that a request takes on its way.
    """
    target = urlsplit(uri)
    begun: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def carry(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(target.hostname, target.port or 80)
            ways = carry(reader, back, milliseconds / 1000), carry(there, writer, 0.0)
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            writer.close()

    async def listen() -> None:
        stopped = asyncio.Event()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        begun.set_result((port, asyncio.get_running_loop(), stopped))
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(listen()), name="away", daemon=True)
    thread.start()
    port, loop, stopped = begun.result()
    try:
        user, at, _ = target.netloc.rpartition("@")
        yield f"http://{user}{at}127.0.0.1:{port}{target.path}"
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(5)


def _delivery_seconds(process: psutil.Process) -> float:
    """Processor time of the shipper's threads so far."""
    wanted = {t.native_id for t in threading.enumerate() if t.name.startswith("ship")}
    return sum(t.user_time + t.system_time for t in process.threads() if t.id in wanted)
