"""How much memory this process may take: the machine's, its container's, its own limit."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# Of versions 2 and 1 of control groups: limit and usage; what counts kills.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_EVENTS = ("memory.events", "memory.oom_control")
_UNLIMITED = 1 << 60  # version 1 says "no limit" by a number near 2**63


class Allowance(NamedTuple):
    """Bytes that this process may still take, and what sets the limit."""

    bytes: int
    source: str


def available(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Allowance:
    """Return how much memory this process may still take.

    That is the least of what the machine has, of what the control groups around this process leave
    (versions 1 and 2), and of RLIMIT_AS, which is an upper bound: it counts addresses, not memory.

    Args:
        root: where the control groups are mounted.
        membership: the file that names this process's groups.
    """
    found = [Allowance(psutil.virtual_memory().available, "the machine")]
    for folder, names in _groups(root, membership):
        limit, used = (_read(folder / name) for name in names)
        if limit is not None and limit < _UNLIMITED:
            left = limit - max(0, (used or 0) - _reclaimable(folder))
            found.append(Allowance(max(0, left), f"the container's limit of {limit / 1e9:.2f} GB"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        left = soft - psutil.Process().memory_info().vms
        found.append(Allowance(max(0, left), f"RLIMIT_AS of {soft / 1e9:.2f} GB"))
    return min(found)


def oom_kills(
    root: Path = _CGROUPS,
    membership: Path = Path("/proc/self/cgroup"),
    machine: Path = Path("/proc/vmstat"),
) -> dict[str, int]:
    """Return how often the kernel has killed a process for lack of memory, so far.

    Returns:
        By the file that counts: of the control group of this process, and of the machine.
    """
    files = [folder / name for folder, _ in _groups(root, membership)[:1] for name in _EVENTS]
    counts = {str(file): _table(file).get("oom_kill") for file in (*files, machine)}
    return {file: count for file, count in counts.items() if count is not None}


def killed_since(before: Mapping[str, int]) -> str | None:
    """Return that the kernel has killed a process for lack of memory since; None if not.

    Args:
        before: what :func:`oom_kills` returned.
    """
    for name, count in before.items():
        file = Path(name)
        if _table(file).get("oom_kill", 0) > count:
            limits = (_read(file.parent / limit) for limit, _ in _LIMITS)
            limit = next((one for one in limits if one is not None and one < _UNLIMITED), None)
            limited = f"; the container's limit is {limit / 1e9:.2f} GB" if limit else ""
            return f"perhaps for lack of memory: the kernel killed a process for that{limited}"
    return None


def _groups(root: Path, membership: Path) -> list[tuple[Path, tuple[str, str]]]:
    """The folders of the control groups around this process, with the names of limit and usage."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            base, names = root, _LIMITS[0]
        elif "memory" in controllers.split(","):
            base, names = root / "memory", _LIMITS[1]
        else:
            continue
        # In a container the path may be that of the host, and only the root is there.
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base) and folder.is_dir():
                found.append((folder, names))
    return found


def _reclaimable(folder: Path) -> int:
    """Bytes of files that the kernel drops before it runs out."""
    counts = _table(folder / "memory.stat")
    return counts.get("inactive_file", counts.get("total_inactive_file", 0))


def _table(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _read(path: Path) -> int | None:
    """A number; None for "max", and where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
