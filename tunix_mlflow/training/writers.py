"""What the loop knows about tracking: somewhere to write metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class MetricWriter(Protocol):
    """Receive every metric of the loop, as plain floats, in the order of steps."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step; must not block."""

    def flush(self) -> None:
        """Make what was recorded durable; called before each checkpoint."""
