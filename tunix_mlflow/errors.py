"""Every named exception of the project, each with its exit code.

A message states what was wrong, where, and what to do, in one line. The command line prints it and
exits with ``exit_code``.
"""

from __future__ import annotations

import signal


class TunixMlflowError(Exception):
    """Base class: an error whose message a user can act on."""

    exit_code = 1


class InputError(TunixMlflowError):
    """An input is wrong; nothing was changed."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration file, key or value is wrong."""


class DatasetError(InputError):
    """A dataset, a seed, a trace file or the catalog is missing or malformed."""


class ModelError(InputError):
    """A pretrained model's files are missing, damaged, or of an architecture not implemented."""


class DeviceError(InputError):
    """The requested device does not exist."""


class TrackingError(InputError):
    """An MLflow server, a run or a logged model does not exist or cannot be used."""


class CheckpointError(InputError):
    """There is no checkpoint that can be used."""


class BenchmarkError(TunixMlflowError):
    """A benchmark failed; the message has the end of its output."""


class UnavailableError(TunixMlflowError):
    """The disk, memory, the network or a lock is not available now; worth a retry."""

    exit_code = 4


class Refused(TunixMlflowError):
    """A check or a gate refused; the message has the reason."""

    exit_code = 3


class IntegrityError(Refused):
    """Stored content does not match its digest."""


class TrainingStopped(TunixMlflowError):
    """Training cannot continue, for example because the loss is not finite."""


class Interrupted(TunixMlflowError):
    """A signal stopped the process; the exit code is 128 plus its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum
