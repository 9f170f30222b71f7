"""The environment that jax reads when it is loaded.

XLA reads NPROC and XLA_FLAGS once, so nothing here may import jax; the import rule's test holds
this.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Mapping

from tunix_mlflow import paths
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import ConfigError

DETERMINISTIC_GPU = "--xla_gpu_deterministic_ops=true"
FAST_CPU = "--xla_cpu_enable_fast_math=true"
QUICK_CPU = "--xla_backend_optimization_level=1"
"""Of LLVM, which XLA has at 3: a step compiles in 0.85 of the time. It runs no slower, and its bits
were the same with AdamW, Muon, bfloat16, remat, and at the shape of SmolLM2-135M."""


def prepare(config: Config, recorded: Mapping[str, str] | None = None) -> None:
    """Set the environment that XLA reads when it is loaded, and have Python collect less garbage.

    Args:
        config: `device`, `mesh`, `training.deterministic` and `training.fast_math` are read.
        recorded: the environment of the run that is resumed, which wins: bit-identity
            depends on the number of threads.

    Raises:
        ConfigError: if jax was imported already with another environment.
    """
    wanted: dict[str, str] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted["NPROC"] = os.environ.get("NPROC") or str(cores or 1)
    flags = os.environ.get("XLA_FLAGS", "")
    asked = {
        DETERMINISTIC_GPU: config.training.deterministic,
        FAST_CPU: config.training.fast_math,
        # Nobody asked for it: a level that the user names stays, and a jax that is loaded already.
        QUICK_CPU: QUICK_CPU.partition("=")[0] not in flags
        and flags.strip()[:2] in ("", "--")  # else XLA takes it all for the name of a file
        and "jax" not in sys.modules
        and _cpu_alone(config.device),
    }
    for flag, wish in asked.items():
        if wish and flag not in flags:
            flags = f"{flags} {flag}".strip()
    wanted["XLA_FLAGS"] = flags
    before = dict(recorded or {})
    if "XLA_FLAGS" in before and not _cpu_alone(config.device):  # the run may have begun on a CPU
        before["XLA_FLAGS"] = before["XLA_FLAGS"].replace(QUICK_CPU, "").strip()
    wanted.update(before)
    if config.mesh.size > 1:
        wanted["JAX_NUM_CPU_DEVICES"] = str(config.mesh.size)
    if config.device.startswith("cpu"):
        wanted["JAX_PLATFORMS"] = "cpu"  # do not take a GPU's memory for nothing
    elif (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms.split(","):
        wanted["JAX_PLATFORMS"] = f"{platforms},cpu"  # where parameters are drawn
    wanted["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        paths.compilation_cache()
    )
    # By default what compiles within a second is compiled again each time.
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    wanted[least] = os.environ.get(least) or "0.05"
    changed = [name for name, value in wanted.items() if os.environ.get(name, "") != value]
    if "jax" in sys.modules and {"NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"} & set(changed):
        raise ConfigError(
            f"jax is loaded already, so {', '.join(changed)} cannot be set any more;"
            " start a new process"
        )
    os.environ.update(wanted)
    # What imports and tracing make stays; to look for garbage in it takes a twentieth of a start.
    gc.set_threshold(100_000, 10, 10)


def _cpu_alone(device: str) -> bool:
    """Whether jax will look for no other device."""
    if device.startswith("cpu") or os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    others = ("jax_plugins", "libtpu")  # packages by which jax finds them
    return device == "auto" and not any(importlib.util.find_spec(name) for name in others)
