"""Who may write to a run: a tag with an owner and a time at which it ends.

Two machines can hold the same run's id; the lease lets one of them write. It is renewed while a
process lives, and ends by itself when one dies. A process on the same state root need not wait for
that: there the kernel's lock on the run's folder tells that the one before it is dead, and the
folder keeps the name under which that one held the lease.
"""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import TrackingError

TAG = "tunix.lease"
SECONDS = 60.0
RENEW_SECONDS = 15.0
_SETTLE_SECONDS = 0.5
_FILE = "lease"


class Lease:
    """A run's lease, held by this process."""

    def __init__(self, client: MlflowClient, run_id: str, owner: str) -> None:
        self._client, self._run_id, self._owner = client, run_id, owner
        self._renewed = 0.0

    def due(self) -> bool:
        """Whether it is time to renew."""
        return time.monotonic() - self._renewed > RENEW_SECONDS

    def renew(self) -> bool:
        """Hold it for another while; False when somebody else has taken it."""
        held = holder(self._client.get_run(self._run_id).data.tags)
        if held is not None and held[0] != self._owner:
            return False
        self.write()
        return True

    def write(self) -> None:
        """Hold it from now on."""
        ends = int(1000 * (time.time() + SECONDS))
        self._client.set_tag(self._run_id, TAG, f"{self._owner} {ends}")
        self._renewed = time.monotonic()

    def release(self) -> None:
        """Let it go; who held it last stays on record."""
        held = holder(self._client.get_run(self._run_id).data.tags)
        if held is not None and held[0] == self._owner:
            self._client.set_tag(self._run_id, TAG, f"{self._owner} 0")


def holder(tags: dict[str, str]) -> tuple[str, float] | None:
    """Owner and end (seconds since 1970) of the lease that a run's tags tell of."""
    owner, _, ends = tags.get(TAG, "").partition(" ")
    return (owner, int(ends) / 1000) if owner and ends.isdigit() else None


def expired(tags: dict[str, str]) -> bool:
    """Whether nobody holds the run."""
    held = holder(tags)
    return held is None or held[1] < time.time()


def owner_of(folder: Path) -> str:
    """The name under which this state root holds a run's lease."""
    path = folder / _FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def acquire(client: MlflowClient, run_id: str, folder: Path) -> Lease:
    """Take a run's lease. The caller holds the lock of the run's folder.

    Raises:
        TrackingError: if another machine, or another state root, holds it.
    """
    owner = owner_of(folder)
    lease = Lease(client, run_id, owner)
    tags = client.get_run(run_id).data.tags
    held = holder(tags)
    if held is not None and held[0] != owner and held[1] >= time.time():
        until = datetime.fromtimestamp(held[1], UTC).strftime("%H:%M:%S")
        raise TrackingError(
            f"run {run_id} is open in another process, elsewhere; its lease ends at {until} UTC"
            " unless that process renews it. Wait for it or end it"
        )
    lease.write()
    if held is not None:
        time.sleep(_SETTLE_SECONDS)  # two may have found it free
        now = holder(client.get_run(run_id).data.tags)
        if now is None or now[0] != owner:
            raise TrackingError(f"run {run_id} was taken up by another process at the same moment")
    return lease
