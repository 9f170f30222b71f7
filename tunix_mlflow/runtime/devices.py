"""Which device a run uses, and the environment fingerprint that bit-identity depends on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform

import jax
import jaxlib.version

from tunix_mlflow.config.schema import MeshConfig
from tunix_mlflow.errors import DeviceError
from tunix_mlflow.runtime import environment

NUMERICS = 2
"""Version of our own numerics. Raise it when the learning-rate schedule, the order of batches, how
an example is rendered, or a kernel changes, so that the same configuration and data give other
bits. A run of another version is not resumed, only forked."""


def use(device: str, count: int = 1) -> jax.Device:
    """Make a device jax's default, and return it.

    Args:
        device: auto, cpu, gpu or tpu, with an optional :index.
        count: devices that will be used, `mesh.size`: a CPU is split into that many virtual ones,
            if no device of jax has been used yet.

    Raises:
        DeviceError: if it is not there; there is no fallback to another device.
    """
    kind, _, index = device.partition(":")
    number = int(index or 0)
    virtual: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if kind in ("auto", "cpu") and virtual < count:
        # RuntimeError: a backend is initialized; `group` says what to do where devices are missing.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    try:
        devices = jax.devices() if kind == "auto" else jax.devices(kind)
    except RuntimeError as error:
        have = ", ".join(sorted({d.platform for d in jax.devices("cpu")} | _other_platforms()))
        raise DeviceError(
            f"device={device}: jax finds no {kind} here (it finds {have}); use another"
            " device, or install jax for it"
        ) from error
    if number >= len(devices):
        raise DeviceError(f"device={device}: there are {len(devices)} of them, counted from 0")
    jax.config.update("jax_default_device", devices[number])
    return devices[number]


def group(first: jax.Device, count: int) -> list[jax.Device]:
    """Return `count` devices of a kind, from `first` on.

    Raises:
        DeviceError: if there are fewer.
    """
    devices: list[jax.Device] = jax.local_devices(backend=first.platform)
    devices = devices[devices.index(first) :]
    if len(devices) < count:
        remedy = "lower mesh.data or mesh.fsdp"
        if first.platform == "cpu":
            remedy += f", or set JAX_NUM_CPU_DEVICES={count} before Python starts"
        raise DeviceError(
            f"mesh needs {count} devices, and there are {len(devices)} from {first} on; {remedy}"
        )
    return devices[:count]


def fingerprint(device: jax.Device, mesh: MeshConfig) -> dict[str, str]:
    """Return what bit-identity depends on besides the configuration and the data."""
    return {
        "numerics": str(NUMERICS),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": str(jax.local_device_count(device.platform)),
        "mesh": f"data={mesh.data},fsdp={mesh.fsdp}",
        "machine": platform.machine(),
        "threads": environment.threads(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def return_freed_memory() -> None:
    """Return freed memory of Python and XLA to the system; does nothing except on glibc.

    The C library keeps the memory that initialising and compiling used, in pieces too small for a
    step's one large buffer, which is then allocated on top: half a gigabyte for a model of 135
    million parameters.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _other_platforms() -> set[str]:
    try:
        return {d.platform for d in jax.devices()}
    except RuntimeError:
        return set()
