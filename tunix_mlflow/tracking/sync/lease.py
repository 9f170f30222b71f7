"""Who may write to a run: a tag with an owner and a time at which it ends.

Two machines can hold the same run's id; the lease lets one of them write. It is renewed while a
process lives, and ends by itself when one dies. A process on the same state root need not wait for
that: there the kernel's lock on the run's folder tells that the one before it is dead, and the
folder keeps the name under which that one held the lease.

Clocks of machines differ, by a day where one was set wrong. So nobody waits for a lease longer than
the lease is long, by the own clock; what is renewed meanwhile is alive, whatever its time says.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlflow.tracking import MlflowClient

from tunix_mlflow import files
from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.tracking.record.folder import LEASE
from tunix_mlflow.tracking.sync import fence
from tunix_mlflow.tracking.tags import LEASE as TAG

_CONFIRM_SECONDS = 0.5
_SAFE = 0.9  # of its length, for what is under way
_POLL_SECONDS = 0.5


class Holder(NamedTuple):
    """What a run's tag says of its lease."""

    owner: str
    ends: float  # seconds since 1970, by the owner's clock; 0: it was released
    seconds: float | None  # how long it is, each time

    def wait_seconds(self, now: float, length: float) -> float:
        """Return for how long to wait, from `now`, until it is over, if nobody renews it."""
        return max(0.0, min(self.ends - now, self.seconds or length))


class Lease:
    """A run's lease, held by this process. Safe to use from several threads.

    Args:
        client: reaches MLflow.
        run_id: the run.
        owner: the name under which it is held.
        seconds: for how long it is taken, each time.
        renewed: when it was taken, by :func:`now`; the default: it has to be.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        owner: str,
        seconds: float,
        renewed: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self._client, self._run_id, self._owner = client, run_id, owner
        self._seconds, self._renewed = seconds, renewed
        self._lock, self._released = threading.Lock(), False

    def keep(self) -> bool:
        """Renew it when it is time to; return False when another process holds it."""
        with self._lock:
            while not self._released and self._age() > self._seconds / 4:
                asked = now()
                held = holder(self._client.get_run(self._run_id).data.tags)
                if held is not None and held.owner != self._owner:
                    return False
                try:
                    # Not long after it was asked for: another one may have taken it.
                    with fence.guard(partial(_is_older, asked, self._seconds / 2)):
                        self.write()
                except fence.LeaseOver:
                    continue
            return True

    def is_over(self) -> bool:
        """Return whether another process may hold it by now."""
        return self._age() > _SAFE * self._seconds

    def write(self) -> None:
        """Hold it from now on."""
        begun = now()
        self._client.set_tag(self._run_id, TAG, _value(self._owner, self._seconds))
        self._renewed = begun

    def _age(self) -> float:
        return _since(self._renewed)

    def release(self) -> None:
        """End it; who held it last stays on record."""
        with self._lock:
            self._released = True
            asked = now()
            held = holder(self._client.get_run(self._run_id).data.tags)
            if held is None or held.owner != self._owner:
                return
            with (
                contextlib.suppress(fence.LeaseOver),  # it has ended by itself
                fence.guard(partial(_is_older, asked, self._seconds / 2)),
            ):
                self._client.set_tag(self._run_id, TAG, f"{self._owner} 0")


def now() -> tuple[float, float]:
    """Return the time by the wall clock, which goes on while a machine sleeps, and by the other,
    which nobody sets back."""
    return time.time(), time.monotonic()


def _since(then: tuple[float, float]) -> float:
    """The seconds since a time, by the clock that says more."""
    return max(abs(time.time() - then[0]), time.monotonic() - then[1])


def _is_older(then: tuple[float, float], seconds: float) -> bool:
    return _since(then) > seconds


def new_owner() -> str:
    """Return a name under which a lease can be held."""
    return uuid.uuid4().hex


def tag(owner: str, seconds: float) -> dict[str, str]:
    """Return the tag of a lease that begins now; with it a run is made."""
    return {TAG: _value(owner, seconds)}


def _value(owner: str, seconds: float) -> str:
    return f"{owner} {int(1000 * (time.time() + seconds))} {seconds:g}"


def record_owner(folder: Path, owner: str) -> None:
    """Record the name under which this state root holds a run's lease."""
    files.write_atomically(folder / LEASE, owner.encode())


def holder(tags: Mapping[str, str]) -> Holder | None:
    """Return the lease in a run's tags; None if there is none."""
    owner, ends, seconds = [*tags.get(TAG, "").split(" "), "", ""][:3]
    if not owner or not ends.isdigit():
        return None
    try:
        length = float(seconds) if seconds else None
    except ValueError:
        length = None
    return Holder(owner, int(ends) / 1000, length)


def expired(tags: Mapping[str, str]) -> bool:
    """Return whether nobody holds the run."""
    held = holder(tags)
    return held is None or held.ends < time.time()


def owner_of(folder: Path) -> str:
    """Return the name under which this state root holds a run's lease."""
    path = folder / LEASE
    if not path.exists() or not path.read_bytes().isalnum():
        record_owner(folder, new_owner())
    return path.read_text()


def acquire(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    seconds: float,
    report: Callable[[str], None],
    *,
    take_over: bool = False,
) -> Lease:
    """Take a run's lease. The caller holds the lock of the run's folder.

    A lease that another process holds is waited for; when it is renewed meanwhile, its holder is
    alive.

    Args:
        client: reaches MLflow.
        run_id: the run.
        folder: its folder on this machine.
        seconds: for how long it is taken, each time.
        report: called when there is something to wait for.
        take_over: do not wait; whoever holds it stops when it finds out.

    Raises:
        UnavailableError: if another machine, or another state root, has the run open.
    """
    owner = owner_of(folder)
    lease = Lease(client, run_id, owner, seconds)
    first = holder(client.get_run(run_id).data.tags)
    if first is not None and first.owner != owner and not take_over:
        _wait_for(client, run_id, first, seconds, report)
    lease.write()
    if first is None or first.owner != owner:
        time.sleep(_CONFIRM_SECONDS)  # two may have found it free
        now = holder(client.get_run(run_id).data.tags)
        if now is None or now.owner != owner:
            raise UnavailableError(
                f"run {run_id}: lease lost to another process at the same moment; try again"
            )
    return lease


def _wait_for(
    client: MlflowClient,
    run_id: str,
    first: Holder,
    length: float,
    report: Callable[[str], None],
) -> None:
    """Wait until another process's lease is over.

    Raises:
        UnavailableError: if it is renewed meanwhile.
    """
    left = first.wait_seconds(time.time(), length)
    if left:
        report(
            f"run {run_id} may be open elsewhere: waiting {left:.0f} s for its lease to end"
            " (resume --take-over REASON does not wait)"
        )
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        held = holder(client.get_run(run_id).data.tags)
        if held is None or not held.ends:
            return
        if held != first:
            raise UnavailableError(
                f"run {run_id} is open in another process, elsewhere; wait for it, end it, or take"
                " it over with resume --take-over REASON"
            )
