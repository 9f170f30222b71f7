"""Which device a run uses, and what of the environment its figures depend on."""

from __future__ import annotations

import ctypes
import os
import platform

import jax
import jaxlib.version

from tunix_mlflow.config.schema import MeshConfig
from tunix_mlflow.errors import DeviceError


def use(device: str) -> jax.Device:
    """Make `device` (auto, cpu, gpu, tpu, with an optional :index) jax's default.

    Raises:
        DeviceError: if it is not there; nothing falls back to another device.
    """
    kind, _, index = device.partition(":")
    number = int(index or 0)
    try:
        found = jax.devices() if kind == "auto" else jax.devices(kind)
    except RuntimeError as error:
        have = ", ".join(sorted({d.platform for d in jax.devices("cpu")} | _other_platforms()))
        raise DeviceError(
            f"device={device}: jax finds no {kind} here (it finds {have}); use another"
            " device, or install jax for it"
        ) from error
    if number >= len(found):
        raise DeviceError(f"device={device}: there are {len(found)} of them, counted from 0")
    jax.config.update("jax_default_device", found[number])
    return found[number]


def group(first: jax.Device, count: int) -> list[jax.Device]:
    """`count` devices of a kind, from `first` on.

    Raises:
        DeviceError: if there are fewer.
    """
    found: list[jax.Device] = jax.local_devices(backend=first.platform)
    found = found[found.index(first) :]
    if len(found) < count:
        raise DeviceError(
            f"mesh needs {count} devices, and there are {len(found)} from {first} on;"
            " lower mesh.data or mesh.fsdp"
        )
    return found[:count]


def fingerprint(device: jax.Device, mesh: MeshConfig) -> dict[str, str]:
    """What bit-identity depends on besides the configuration and the data."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": str(jax.local_device_count(device.platform)),
        "mesh": f"data={mesh.data},fsdp={mesh.fsdp}",
        "machine": platform.machine(),
        "nproc": os.environ.get("NPROC", ""),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def return_freed_memory() -> None:
    """Give the system back what Python and XLA have freed; does nothing but on glibc.

    The C library keeps what initialising and compiling took in pieces too small for a step's one
    large buffer, which then comes on top: half a gigabyte for a model of 135 million parameters.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _other_platforms() -> set[str]:
    try:
        return {d.platform for d in jax.devices()}
    except RuntimeError:
        return set()
