"""What the loop knows about tracking: somewhere to write scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class MetricWriter(Protocol):
    """Receives every metric of the loop, as plain floats, in the order of steps."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of one step; must not block."""

    def flush(self) -> None:
        """Make what was written durable; called before each checkpoint."""
