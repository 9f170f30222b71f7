"""CPU, memory, disk, network and GPU use, sampled into the metrics log.

MLflow's own monitor asks the server before each sample and gives up when it is away, so only its
sensors are used. It also logs a line where there is no GPU, which a library must not.
"""

from __future__ import annotations

import contextlib
import threading

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from tunix_mlflow.tracking.record.metrics_log import MetricsLog

PREFIX = "system/"
INTERVAL_SECONDS = 5.0


class SystemMetrics:
    """Samples until :meth:`finish`. The step counts samples, and continues in a resumed run."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log
        self._step = log.next_step(PREFIX)
        self._sensors = _sensors()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for sensor in self._sensors:
                with contextlib.suppress(Exception):  # a GPU that is lost; the others continue
                    sensor.collect_metrics()
            if self._done.wait(INTERVAL_SECONDS):
                return
            sample: dict[str, float] = {}
            for sensor in self._sensors:
                sample.update(sensor.aggregate_metrics())
                sensor.clear_metrics()
            metrics = {f"{PREFIX}{name}": float(value) for name, value in sample.items()}
            self._log.log_metrics(metrics, self._step)
            self._step += 1


def _sensors() -> list[BaseMetricsMonitor]:
    sensors: list[BaseMetricsMonitor] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        # Without a network, a GPU or its library they raise what they like.
        with contextlib.suppress(Exception):
            sensors.append(kind())
    return sensors
