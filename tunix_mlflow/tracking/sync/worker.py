"""The threads that keep MLflow up to date with a run folder, and outlive a dead server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.record.cursor import pending_bytes
from tunix_mlflow.tracking.record.folder import read_link
from tunix_mlflow.tracking.record.records import Lane
from tunix_mlflow.tracking.sync import fence
from tunix_mlflow.tracking.sync.answers import understand
from tunix_mlflow.tracking.sync.delivery import LANES, Away, Delivery
from tunix_mlflow.tracking.sync.lease import Lease, acquire

INTERVAL_SECONDS = 2.0  # between two looks at the logs
RETRY_SECONDS = 1.0
SILENT_SECONDS = 4.0  # without an answer until the user is told
_MOST_SILENT_SECONDS = 120.0
_UPLOAD_SECONDS = 600.0
PATIENCE_SECONDS = 15.0  # without an answer until the end of a run stops waiting

_TRACKING_API = "/api/2.0/mlflow/"  # in errors of requests to the tracking server

_THREADS: tuple[tuple[Lane, ...], ...] = (
    ("fields", "metrics", "status"),
    ("artifacts",),
    ("models",),
)
"""Lanes of small requests share a thread; an upload may take minutes, and has one to itself."""


class SyncWorker:
    """Delivers what a run folder holds, in the background.

    Args:
        folder: the run's.
        client: reaches MLflow.
        report: called when MLflow is away, when it is back, and with what it refuses.
        lease_seconds: for how long the run's lease is taken, each time.
        lost: called when another process has taken the run's lease.
        lease: the run's, if this process holds it already.
        is_away: whether the user was told that MLflow is away.
    """

    def __init__(
        self,
        folder: Path,
        client: MlflowClient,
        report: Callable[[str], None],
        lease_seconds: float,
        lost: Callable[[], None] = lambda: None,
        lease: Lease | None = None,
        is_away: bool = False,
    ) -> None:
        self.folder, self._client, self._report, self._lost = folder, client, report, lost
        self.lease = lease  # None: it is taken as soon as MLflow has the run
        self._lease_seconds = lease_seconds
        self._taking = threading.Lock()  # of the lease
        self._stop = threading.Event()
        self._lanes = {name: _Lane(Delivery(client, folder, name, report)) for name in LANES}
        self._lanes["fields"].is_away = is_away
        self._wakes = [threading.Event() for _ in _THREADS]
        self._threads = [
            threading.Thread(
                target=self._run,
                name=f"sync-{names[0]}",
                args=([self._lanes[name] for name in names], wake),
                daemon=True,
            )
            for names, wake in zip(_THREADS, self._wakes, strict=True)
        ]
        for run in (self._watch, self._renew):
            name = f"sync{run.__name__.replace('_', '-')}"
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for records now."""
        for wake in self._wakes:
            wake.set()

    def drain(self, patience: float | None = None) -> bool:
        """Wait until everything is delivered, as long as MLflow answers.

        Args:
            patience: seconds without an answer until it gives up. While the server can be asked,
                an attempt that is under way may take longer: a large upload, or a request that was
                sent before the server was back and has to time out.

        Returns:
            Whether MLflow has, or refuses, everything.
        """
        allowed = PATIENCE_SECONDS if patience is None else patience
        begun = time.monotonic()
        failures = {name: lane.failures for name, lane in self._lanes.items()}

        def is_hopeful(name: Lane, lane: _Lane) -> bool:
            quiet = time.monotonic() - max(begun, lane.answered)
            # The first failure may be of a request that was sent while the server was away.
            under_way = lane.failures - failures[name] < 2 and quiet < _UPLOAD_SECONDS
            return quiet <= allowed or (under_way and store.answers())

        while pending_bytes(self.folder):
            if self._stop.is_set():
                return False
            if not any(is_hopeful(name, lane) for name, lane in self._busy()):
                return not pending_bytes(self.folder)
            self.wake()
            time.sleep(0.02)
        return True

    @property
    def problem(self) -> str:
        """What keeps MLflow from having the rest, in words; empty if nothing is known."""
        found = [lane.problem() for _, lane in self._busy() if lane.why is not None]
        return "; ".join(dict.fromkeys(found))

    def give_up(self) -> None:
        """End a :meth:`drain`."""
        self._stop.set()

    def close(self) -> None:
        """End the threads; what was not delivered stays in the folder."""
        self._stop.set()
        self.wake()
        for thread in self._threads:
            thread.join(5)  # one that hangs in a request is left behind

    def _run(self, lanes: list[_Lane], wake: threading.Event) -> None:
        while not self._stop.is_set():
            try:
                while not self._stop.is_set() and any(lane.is_due() for lane in lanes):
                    if not self._holds():
                        self._end_lost()
                        return
                    if not self._deliver_held(lanes):
                        break  # a line that is still being written, or a lane that has to wait
            except Exception as error:  # of the lease; the folder has all records
                for lane in lanes:
                    lane.failed(Away(understand(error).why))
            later = [lane.retry_at - time.monotonic() for lane in lanes if not lane.is_due()]
            wake.wait(min([INTERVAL_SECONDS, *later]))
            wake.clear()

    def _deliver_held(self, lanes: list[_Lane]) -> bool:
        """Deliver a record of each lane, as long as the lease is not over."""
        if self.lease is None:
            return self._deliver_next(lanes)
        try:
            with fence.guard(self.lease.is_over):
                return self._deliver_next(lanes)
        except fence.LeaseOver:
            return True  # whose it is now is asked before the next try

    def _deliver_next(self, lanes: list[_Lane]) -> bool:
        """Deliver a record of each lane; whether there was one."""
        delivered = False
        for lane in lanes:
            if not lane.is_due():
                continue
            try:
                delivered |= lane.delivery.deliver_next()
                lane.heard(self._report)
            except Away as error:
                for each in lanes if error.is_outage else [lane]:  # of the same server
                    each.failed(error)
            except Exception as error:  # whatever it is, the folder has all records
                lane.failed(Away(one_line(error)))
        return delivered

    def _busy(self) -> list[tuple[Lane, _Lane]]:
        """The lanes that have something to deliver; the status, when nothing else has."""
        if read_link(self.folder) is None:
            return [("fields", self._lanes["fields"])]
        busy = [(n, lane) for n, lane in self._lanes.items() if pending_bytes(self.folder, n)]
        return [one for one in busy if one[0] != "status"] or busy

    def _holds(self) -> bool:
        """Return whether this process may write to the run."""
        with self._taking:
            link = read_link(self.folder)
            if self.lease is not None:
                return self.lease.keep()
            if link is not None:
                try:
                    self.lease = acquire(
                        self._client, link.run_id, self.folder, self._lease_seconds, self._report
                    )
                except UnavailableError as error:
                    self._report(str(error))
                    return False
            return True

    def _renew(self) -> None:
        """Keep the lease while the other threads upload large files."""
        while not self._stop.wait(min(1.0, self._lease_seconds / 8)):
            try:
                if self.lease is not None and not self.lease.keep():
                    self._end_lost()
            except Exception as error:  # away; the others ask again before they deliver
                del error

    def _end_lost(self) -> None:
        self._stop.set()
        self._lost()

    def _watch(self) -> None:
        """Say so when MLflow is away: another thread may hang in a request."""
        while not self._stop.wait(0.25):
            for _, lane in self._busy():
                if not self.is_away and lane.is_silent() and not self._stop.is_set():
                    lane.is_away = True
                    self._report(
                        f"{lane.problem()}: recording in {self.folder}; pending records are"
                        " uploaded when it is back"
                    )

    @property
    def is_away(self) -> bool:
        """Whether the user was told that something keeps records from MLflow."""
        return any(lane.is_away for lane in self._lanes.values())


class _Lane:
    """How the delivery of a lane goes."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.answered = time.monotonic()  # when MLflow last did what was asked
        self.why: Away | None = None  # the last attempt failed
        self.failures = 0  # so far
        self.retry_at = 0.0
        self.is_away = False  # the user was told
        self._probe_at, self._is_well = 0.0, True
        self._limit = 1.0  # grows, so that a server that comes and goes is not told each time

    def is_due(self) -> bool:
        """Whether it may be tried now."""
        return time.monotonic() >= self.retry_at

    def heard(self, report: Callable[[str], None]) -> None:
        """Note that MLflow did what was asked."""
        self.answered, self.why, self.retry_at = time.monotonic(), None, 0.0
        self._is_well = True
        if self.is_away:
            self.is_away = False
            self._limit *= 2
            report(f"{self._place()} answers again")

    def failed(self, why: Away) -> None:
        """Note an attempt that failed."""
        self.why = why
        self.failures += 1
        self.retry_at = time.monotonic() + (why.retry_after or RETRY_SECONDS)

    def is_silent(self) -> bool:
        """Whether the user should be told; slow is not away."""
        limit = min(self._limit * SILENT_SECONDS, max(SILENT_SECONDS, _MOST_SILENT_SECONDS))
        now = time.monotonic()
        # In time, since a server that hangs takes the probe's seconds to be found out.
        if self.why is None and now - self.answered > limit / 8 and now >= self._probe_at:
            self._probe_at = now + SILENT_SECONDS
            self._is_well = store.answers()
        if time.monotonic() - self.answered <= limit:
            return False
        return self.why is not None or not self._is_well

    def problem(self) -> str:
        """Return what keeps the lane from being delivered."""
        if self.why is not None and not self.why.is_outage:
            return str(self.why)
        why = f" ({self.why})" if self.why is not None else ""
        return f"{self._place()} does not answer{why}"

    def _place(self) -> str:
        uploads = self.delivery.lane in ("artifacts", "models")
        if uploads and _TRACKING_API not in str(self.why) and store.answers():
            return "MLflow's artifact store"
        return "MLflow"
