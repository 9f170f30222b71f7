"""Every named exception of the project, each with the exit code it stands for.

A message says what was wrong, where, and what to do, in one line. The command line and
the project scripts print it and exit with ``exit_code``; nothing else catches these.
"""

from __future__ import annotations

import signal


class TunixMlflowError(Exception):
    """Base class: something a user can read and act on."""

    exit_code = 1


class InputError(TunixMlflowError):
    """What the user gave is wrong; nothing was changed."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration file, key or value is wrong."""


class DatasetError(InputError):
    """A dataset, a seed, a trace file or the catalog is missing or malformed."""


class ModelError(InputError):
    """A pretrained model's files are missing, damaged, or of a kind that is not implemented."""


class DeviceError(InputError):
    """The device that was asked for is not there."""


class TrackingError(InputError):
    """The MLflow server, a run or a logged model cannot be reached or used."""


class CheckpointError(InputError):
    """No checkpoint can be used for what was asked."""


class BenchmarkError(TunixMlflowError):
    """Something that is measured failed; the message has its last words."""


class UnavailableError(TunixMlflowError):
    """The disk, memory, the network or a lock is not available now; worth a retry."""

    exit_code = 4


class Refused(TunixMlflowError):
    """A check or a gate said no; the reason is the message."""

    exit_code = 3


class IntegrityError(Refused):
    """Stored content is not what its digest says."""


class TrainingStopped(TunixMlflowError):
    """Training cannot go on, for example because the loss is not finite."""


class Interrupted(TunixMlflowError):
    """A signal asked the process to end; the exit code is 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum
