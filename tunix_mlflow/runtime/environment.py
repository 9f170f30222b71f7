"""The environment that jax reads when it is loaded: exported by the command line, checked by all.

XLA reads NPROC and XLA_FLAGS once, so nothing here may import jax; the import rule's test checks
this.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tunix_mlflow import paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError

DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"
FAST_CPU = "--xla_cpu_enable_fast_math=true"
QUICK_CPU = "--xla_backend_optimization_level=1"
"""Of LLVM, whose default in XLA is 3: a step compiles in 0.85 of the time. It runs no slower, and
its bits were the same with AdamW, Muon, bfloat16, remat, and at the shape of SmolLM2-135M."""


def export(config: Config, recorded: Mapping[str, str] | None = None) -> None:
    """Set the environment that jax reads when it is loaded, and run the garbage collector less.

    For processes of our own, before anything imports jax. The library calls :func:`require`.

    Args:
        config: `device`, `mesh`, `training.deterministic` and `training.fast_math` are read.
        recorded: the environment of the run that is resumed, which is used again: bit-identity
            depends on the number of threads.

    Raises:
        ConfigError: if jax was imported already with another environment.
    """
    wanted = _wanted(config, {k: v for k, v in (recorded or {}).items() if v or k != "NPROC"})
    changed = [name for name, value in wanted.items() if os.environ.get(name, "") != value]
    if "jax" in sys.modules and {"NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"} & set(changed):
        raise ConfigError(
            f"jax is loaded already, so {', '.join(changed)} cannot be set any more;"
            " start a new process"
        )
    os.environ.update(wanted)
    # Importing and tracing make objects that stay: collecting garbage takes a twentieth of a start.
    gc.set_threshold(100_000, 10, 10)


def require(config: Config, recorded: Mapping[str, str] | None = None) -> None:
    """Check that the environment, as it is, can do what a configuration asks for.

    Sets nothing. The number of devices is checked by :func:`devices.use` and `devices.group`.

    Args:
        config: `device`, `training.deterministic` and `training.fast_math` are read.
        recorded: the environment of the run that is resumed; a flag of XLA that it had to change
            results is needed again.

    Raises:
        ConfigError: naming the variable, and the value to set before Python starts.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    before = (recorded or {}).get("XLA_FLAGS", "")
    given = flags if _are_flags(flags) else _read(flags)
    on_cpu = config.device.partition(":")[0] in ("auto", "cpu")
    needed = {
        FAST_CPU: on_cpu and (config.training.fast_math or FAST_CPU in before),
        DETERMINISTIC_GPU: not _cpu_alone(config.device)
        and (config.training.deterministic or DETERMINISTIC_GPU in before),
    }
    missing = [flag for flag, need in needed.items() if need and flag not in given]
    if missing:
        keep = [flags] if flags and _are_flags(flags) else []
        raise ConfigError(
            f"this configuration needs other flags of XLA, which reads them once: set"
            f" XLA_FLAGS={' '.join([*keep, *missing])!r} before Python starts"
        )
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        raise ConfigError(
            f"parameters are initialized on the CPU, which JAX_PLATFORMS={platforms} leaves out:"
            f" set JAX_PLATFORMS={platforms},cpu before Python starts"
        )


def threads() -> str:
    """Return the number of XLA's threads on a CPU: NPROC, else the cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("NPROC") or str(cores or 1)


def to_record() -> dict[str, str]:
    """Return the variables that a resumed run needs again, as they are now."""
    return {"NPROC": threads(), "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def _wanted(config: Config, recorded: dict[str, str]) -> dict[str, str]:
    wanted = {"NPROC": threads()}
    flags = os.environ.get("XLA_FLAGS", "")
    conditions = {
        DETERMINISTIC_GPU: config.training.deterministic,
        FAST_CPU: config.training.fast_math,
        # A default only: a level that the user names stays, and so does a jax that is loaded.
        QUICK_CPU: QUICK_CPU.partition("=")[0] not in flags
        and _are_flags(flags)
        and "jax" not in sys.modules
        and _cpu_alone(config.device),
    }
    for flag, condition in conditions.items():
        if condition and flag not in flags:
            flags = f"{flags} {flag}".strip()
    wanted["XLA_FLAGS"] = flags
    if "XLA_FLAGS" in recorded and not _cpu_alone(config.device):  # the run may be from a CPU
        recorded = recorded | {"XLA_FLAGS": recorded["XLA_FLAGS"].replace(QUICK_CPU, "").strip()}
    wanted |= recorded
    if config.mesh.size > 1:
        wanted["JAX_NUM_CPU_DEVICES"] = str(config.mesh.size)
    if config.device.startswith("cpu"):
        wanted["JAX_PLATFORMS"] = "cpu"  # do not reserve a GPU's memory
    elif (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms.split(","):
        wanted["JAX_PLATFORMS"] = f"{platforms},cpu"  # where parameters are initialized
    wanted["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        paths.compilation_cache()
    )
    # By default what compiles within a second is not cached.
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    wanted[least] = os.environ.get(least) or "0.05"
    return wanted


def _are_flags(text: str) -> bool:
    """Return whether XLA takes XLA_FLAGS as flags, not as the name of a file of flags."""
    return text.strip()[:2] in ("", "--")


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _cpu_alone(device: str) -> bool:
    """Return whether jax will find a CPU and no other device."""
    if device.startswith("cpu") or os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    others = ("jax_plugins", "libtpu")  # packages by which jax finds them
    return device == "auto" and not any(importlib.util.find_spec(name) for name in others)
