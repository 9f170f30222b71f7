"""Suite `tracking`: what recording a step costs it, with and without, in turns.

Blocks of steps alternate between a loop that records, as training does, and one that does not.
Between blocks everything is delivered to MLflow, so that nothing is left for the next one to pay;
a block should be several times as long as the interval between two deliveries, or its last one is
not counted. As the noise of the machine is larger than the cost, the cost is also computed from
its parts: how long the loop waits in each write, and the processor time of the run's threads.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import jax
import psutil

from tunix_mlflow.benchmarks.workload import Workload
from tunix_mlflow.training.writers import MetricWriter


class TrackingCost(NamedTuple):
    """The cost of recording a step."""

    step_ms: list[float]  # not recorded, one value for each block
    recorded_step_ms: list[float]  # recorded, the block beside it
    share: float  # of a step's time: median of the pairs
    write_ms: float  # how long the loop waits in a step's write
    delivery_ms: float  # processor time of the run's threads, per step
    accounted_share: float  # the last two, of a step's processor time


def thread_ids() -> frozenset[int]:
    """Return the native ids of the Python threads of this process."""
    return frozenset(t.native_id for t in threading.enumerate() if t.native_id is not None)


def measure(
    workload: Workload,
    writer: MetricWriter,
    sync: Callable[[], object],
    other_threads: AbstractSet[int],
) -> TrackingCost:
    """Train `repeats` pairs of blocks of `steps` updates.

    Args:
        workload: `benchmark.repeats` and `benchmark.steps` are read.
        writer: receives what training would record.
        sync: returns when all of it is delivered.
        other_threads: native ids of the threads that were there before the run; the others
            deliver what it records.
    """
    trainer, batches = workload.trainer, workload.batches
    config = workload.config.benchmark
    updates = 0
    process = psutil.Process()
    write_seconds: list[float] = []

    def block(*, recorded: bool) -> float:
        nonlocal updates
        start = time.perf_counter()
        for _ in range(config.steps):
            metrics = trainer.step(batches.at(updates))
            updates += 1
            loss, norm = float(metrics.loss), float(metrics.grad_norm)
            if recorded:
                scalars = {"train/loss": loss, "train/grad_norm": norm, "train/tokens": 1.0}
                scalars |= {f"perf/{name}": float(updates) for name in ("a", "b", "c", "d", "e")}
                write_start = time.perf_counter()
                writer.log_metrics(scalars, updates)
                write_seconds.append(time.perf_counter() - write_start)
        jax.block_until_ready(trainer.state)
        seconds = time.perf_counter() - start
        if recorded:
            sync()
        return 1000 * seconds / config.steps

    def delivery_seconds() -> float:
        ids = thread_ids() - other_threads
        return sum(t.user_time + t.system_time for t in process.threads() if t.id in ids)

    block(recorded=True)  # compiles, and opens connections
    write_seconds.clear()
    step_ms: list[float] = []
    recorded_step_ms: list[float] = []
    delivered, cpu_seconds = delivery_seconds(), 0.0
    for repeat in range(config.repeats):
        for recorded in (True, False) if repeat % 2 else (False, True):
            cpu_start = time.process_time()
            (recorded_step_ms if recorded else step_ms).append(block(recorded=recorded))
            if not recorded:
                cpu_seconds += time.process_time() - cpu_start
    delivered = delivery_seconds() - delivered
    steps = config.repeats * config.steps
    write, delivery = statistics.median(write_seconds), delivered / steps
    return TrackingCost(
        step_ms,
        recorded_step_ms,
        statistics.median(b / a - 1 for a, b in zip(step_ms, recorded_step_ms, strict=True)),
        1000 * write,
        1000 * delivery,
        (write + delivery) / (cpu_seconds / steps),
    )


def summary(cost: TrackingCost) -> str:
    """Return the cost in a few sentences."""
    return (
        f"a step takes {statistics.median(cost.step_ms):.1f} ms, recorded"
        f" {statistics.median(cost.recorded_step_ms):.1f} ms: {cost.share:+.2%} (median of pairs)."
        f" Its parts: {cost.write_ms:.3f} ms in the loop and {cost.delivery_ms:.3f} ms of processor"
        f" time to deliver, {cost.accounted_share:.2%}"
    )


@contextmanager
def delayed_server(uri: str, milliseconds: float) -> Iterator[str]:
    """Yield the address of a proxy that hands requests to a server late.

    Args:
        uri: the server, http://host:port.
        milliseconds: how much later a request arrives.
    """
    target = urlsplit(uri)
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def forward(
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
            replies, requests = await asyncio.open_connection(target.hostname, target.port or 80)
            both = forward(reader, requests, milliseconds / 1000), forward(replies, writer, 0.0)
            await asyncio.gather(*both, return_exceptions=True)
        finally:
            writer.close()

    async def listen() -> None:
        stopped = asyncio.Event()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        started.set_result((port, asyncio.get_running_loop(), stopped))
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(listen()), name="delay", daemon=True)
    thread.start()
    port, loop, stopped = started.result()
    try:
        user, at, _ = target.netloc.rpartition("@")
        yield f"http://{user}{at}127.0.0.1:{port}{target.path}"
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(5)
