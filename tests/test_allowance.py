"""The memory that there is: of the machine, of control groups of both versions, of RLIMIT_AS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import BIN, as_arguments, environment, tiny
from tunix_mlflow.runtime import memory

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GB."""
    fake = psutil.virtual_memory()._replace(available=64 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: fake)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def found(root: Path, membership: str) -> memory.Allowance:
    (root / "membership").write_text(membership)
    return memory.available(root, root / "membership")


def test_version_2(tmp_path: Path) -> None:
    """The least of the groups around the process; files in the cache do not count as used."""
    write(tmp_path / "a", memory__max=f"{2 * GB}\n", memory__current=f"{GB}\n")
    write(tmp_path / "a", memory__stat=f"anon 1\ninactive_file {GB // 2}\n")
    write(tmp_path / "a/b", memory__max="max\n", memory__current="5\n")
    inner = found(tmp_path, "0::/a/b\n")
    assert inner == (3 * GB // 2, "the container's limit of 2.00 GB")
    assert found(tmp_path, "0::/elsewhere/of/the/host\n") == (64 * GB, "the machine")


def test_version_1(tmp_path: Path) -> None:
    """Its files have other names, and no limit is a large number."""
    group = tmp_path / "memory" / "docker" / "x"
    write(group, **{"memory.limit_in_bytes": f"{GB}\n", "memory.usage_in_bytes": f"{GB // 4}\n"})
    no_limit = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "1\n"}
    write(tmp_path / "memory", **no_limit)
    lines = "5:cpu,cpuacct:/\n4:memory:/docker/x\n0::/\n"
    assert found(tmp_path, lines) == (3 * GB // 4, "the container's limit of 1.00 GB")
    # In the container the path is the host's, and the group is mounted as the root.
    write(tmp_path / "memory", **{"memory.limit_in_bytes": f"{3 * GB}\n"})
    assert found(tmp_path, "4:memory:/of/the/host\n").source == "the container's limit of 3.00 GB"


def test_nothing_is_known(tmp_path: Path) -> None:
    """Without control groups, or with files that say nothing, the machine's."""
    assert memory.available(tmp_path, tmp_path / "absent") == (64 * GB, "the machine")
    write(tmp_path / "a", memory__max="what?\n")
    assert found(tmp_path, "0::/a\n:\n\nx") == (64 * GB, "the machine")


def test_a_limit_on_addresses(tmp_path: Path) -> None:
    """RLIMIT_AS, which `ulimit -v` sets."""
    code = "from tunix_mlflow.runtime import memory; print(memory.available().source)"
    words = ["bash", "-c", 'ulimit -v 3000000 && exec "$@"', "-", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "RLIMIT_AS of 3.07 GB\n"


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 700 MB, where one can be made."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"tunix-mlflow-test-{os.getpid()}"
        limit = group / ("memory.max" if root.name == "cgroup" else "memory.limit_in_bytes")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            limit.write_text(str(700 * 10**6))
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group can be made here: not measured")


def test_a_container_of_700_mb(small_group: Path, store: str) -> None:
    """A training that would be killed there is refused before it allocates, with what would fit."""
    words = as_arguments(tiny(model__width="1024", model__layers="4", model__mlp_width="4096"))
    into = f"echo $$ > {small_group}/cgroup.procs && exec"
    done = subprocess.run(
        ["bash", "-c", f'{into} "$@"', "-", str(BIN / "tunix-mlflow"), "train", *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "(the container's limit of 0.70 GB)" in done.stderr
    assert "What would fit" in done.stderr or "Nothing known fits" in done.stderr
    assert "Traceback" not in done.stderr


def test_kills_for_lack_of_memory_are_counted(tmp_path: Path) -> None:
    """In a control group of either version, or by the machine; without a count nothing is said."""
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("700000000\n")
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/job\n")
    machine = tmp_path / "vmstat"
    machine.write_text("pgfault 9\noom_kill 4\n")
    before = memory.oom_kills(tmp_path / "cgroup", membership, machine)
    assert sorted(before.values()) == [1, 4]
    assert memory.killed_since(before) is None
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert "limit is 0.70 GB" in (memory.killed_since(before) or "")
    (group / "memory.events").unlink()
    assert memory.killed_since(before) is None
    machine.write_text("pgfault 9\noom_kill 5\n")
    assert "for lack of memory" in (memory.killed_since(before) or "")
    old = tmp_path / "old" / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    membership.write_text("4:memory:/job\n")
    assert list(memory.oom_kills(tmp_path / "old", membership, tmp_path / "none").values()) == [3]
    assert memory.oom_kills(tmp_path / "none", membership, tmp_path / "none") == {}
