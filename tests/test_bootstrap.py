"""How a process begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunix_mlflow.runtime.environment import QUICK_CPU

ASKED = "always [madvise] never"
SCRIPT = """
import json, os, sys
from pathlib import Path
from tunix_mlflow import huge_pages
huge_pages.restart(Path(sys.argv[1]))
print(json.dumps([os.getpid(), sys.argv[2:], os.environ.get("GLIBC_TUNABLES")]))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="of glibc alone")
@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        (ASKED, None, "glibc.malloc.hugetlb=1"),
        (ASKED, "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        (ASKED, "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        (None, None, None),
    ],
)
def test_large_buffers_ask_for_huge_pages(
    setting: str | None, given: str | None, expected: str | None, tmp_path: Path
) -> None:
    """The same process with the same arguments, where Linux wants to be asked and nobody did."""
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    words = ["two words", "", "--last"]
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "enabled", *words],
        stdout=subprocess.PIPE,
        env=env if given is None else env | {"GLIBC_TUNABLES": given},
    )
    assert json.loads(process.communicate()[0]) == [process.pid, words, expected]
    assert process.returncode == 0


LEVEL_2 = "--xla_backend_optimization_level=2"


@pytest.mark.parametrize(
    ("device", "given", "recorded", "expected"),
    [
        ("auto", "", None, QUICK_CPU),
        ("auto", "--a=1", None, f"--a=1 {QUICK_CPU}"),
        ("auto with a plugin", "", None, ""),  # jax may find another device
        ("cpu with a plugin", "", None, QUICK_CPU),
        ("cpu", LEVEL_2, None, LEVEL_2),
        ("cpu", "flags.txt", None, "flags.txt"),  # XLA reads a file then
        ("cpu", "", "--a=1", "--a=1"),  # resumed as it began
        ("gpu", "", None, ""),
        ("gpu", "", f"--a=1 {QUICK_CPU}", "--a=1"),  # which began on a CPU
        ("gpu", QUICK_CPU, None, QUICK_CPU),
    ],
)
def test_a_cpu_compiles_sooner(
    device: str, given: str, recorded: str | None, expected: str, tmp_path: Path
) -> None:
    """Where jax will find a CPU alone, and neither the user nor a recorded run says otherwise."""
    device, _, plugin = device.partition(" ")
    if plugin:
        (tmp_path / "jax_plugins").mkdir()
    words = f"""
import os, sys
if not {plugin!r}:
    sys.modules["jax_plugins"] = sys.modules["libtpu"] = None
from tunix_mlflow import bootstrap
from tunix_mlflow.config import Config
recorded = {recorded!r}
bootstrap.prepare(Config(device={device!r}), None if recorded is None else dict(XLA_FLAGS=recorded))
print(os.environ["XLA_FLAGS"])
"""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", words],
        capture_output=True,
        text=True,
        env={**env, "XLA_FLAGS": given, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert done.stdout == f"{expected}\n"


ENDS = """
import time
from tunix_mlflow import bootstrap
from tunix_mlflow.config import Config, DataConfig, ModelConfig, TrainingConfig
from tunix_mlflow.errors import ConfigError

def main(_):
    from tunix_mlflow.training import devices, setup
    config = Config(
        model=ModelConfig(layers=40),
        data=DataConfig(sequence_length=64),
        training=TrainingConfig(microbatch_size=4),
    )
    cpu = devices.use("cpu")
    config = setup.settle(config, 300, "cpu")
    plan = setup.planned(config, 300, cpu)
    promised = setup.compile_ahead(plan, config, 300, cpu)
    time.sleep(0.5)
    assert not promised.done()
    raise ConfigError("a mistake")

bootstrap.run(main, computes=False)
"""


def test_a_mistake_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    """One line and exit code 2, while XLA is at work in its thread."""
    (tmp_path / "script.py").write_text(ENDS)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "tunix-mlflow: error: a mistake\n")
