"""The thread that keeps MLflow up to date with a run folder, and outlives a dead server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import UnavailableError
from tunix_mlflow.files import one_line
from tunix_mlflow.tracking import store
from tunix_mlflow.tracking.record import event_log
from tunix_mlflow.tracking.record.folder import read_link
from tunix_mlflow.tracking.sync import delivery
from tunix_mlflow.tracking.sync.lease import Lease, acquire

INTERVAL_SECONDS = 2.0  # between two looks at the logs
RETRY_SECONDS = 1.0
SILENT_SECONDS = 4.0  # without an answer until the user is told
_UPLOAD_SECONDS = 600.0
PATIENCE_SECONDS = 15.0  # without an answer until the end of a run stops waiting


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
        self.is_away = is_away
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._answered = time.monotonic()  # when MLflow last did what was asked
        self._why = ""  # of the last attempt, if it failed
        self._failures = 0  # attempts that failed, so far
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in (
                (self._run, "sync"),
                (self._watch, "sync-watch"),
                (self._renew, "sync-lease"),
            )
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for records now."""
        self._wake.set()

    def drain(self, patience: float | None = None) -> bool:
        """Wait until everything is delivered, as long as MLflow answers.

        Args:
            patience: seconds without an answer until it gives up. While the server can be asked,
                an attempt that is under way may take longer: a large upload, or a request that was
                sent before the server was back and has to time out.

        Returns:
            Whether MLflow has everything.
        """
        allowed = PATIENCE_SECONDS if patience is None else patience
        begun, failures = time.monotonic(), self._failures
        while event_log.pending_bytes(self.folder):
            if self._stop.is_set():
                return False
            quiet = time.monotonic() - max(begun, self._answered)
            # The first failure may be of a request that was sent while the server was away.
            under_way = self._failures - failures < 2 and quiet < _UPLOAD_SECONDS
            if quiet > allowed and not (under_way and store.answers()):
                return False
            self._wake.set()
            time.sleep(0.02)
        return True

    def give_up(self) -> None:
        """End a :meth:`drain`."""
        self._stop.set()

    def close(self) -> None:
        """End the threads; what was not delivered stays in the folder."""
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(5)  # one that hangs in a request is left behind

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                while not self._stop.is_set():
                    if not self._holds():
                        self._end_lost()
                        return
                    if not event_log.pending_bytes(self.folder) or not delivery.deliver_next(
                        self._client, self.folder, self._report
                    ):
                        break  # a line that is still being written
                    self._heard()
                self._heard()
                self._wake.wait(INTERVAL_SECONDS)
            except Exception as error:  # whatever the client raises, the folder has it all
                self._why = one_line(error)
                self._failures += 1
                self._stop.wait(RETRY_SECONDS)
            self._wake.clear()

    def _holds(self) -> bool:
        """Return whether this process may write to the run."""
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
        """Keep the lease while the other thread uploads a large file."""
        while not self._stop.wait(min(1.0, self._lease_seconds / 8)):
            try:
                if self.lease is not None and not self.lease.keep():
                    self._end_lost()
            except Exception as error:  # away; the other thread asks again before it delivers
                del error

    def _end_lost(self) -> None:
        self._stop.set()
        self._lost()

    def _heard(self) -> None:
        self._answered, self._why = time.monotonic(), ""
        if self.is_away:
            self.is_away = False
            self._report("MLflow answers again")

    def _watch(self) -> None:
        """Say so when MLflow is away: the other thread may hang in a request."""
        while not self._stop.wait(0.25):
            quiet = time.monotonic() - self._answered
            if quiet > SILENT_SECONDS and not self.is_away and event_log.pending_bytes(self.folder):
                self.is_away = True
                why = f" ({self._why})" if self._why else ""
                self._report(
                    f"MLflow does not answer{why}: recording in {self.folder}; pending records are"
                    " uploaded when it is back"
                )
