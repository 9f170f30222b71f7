"""The environment that jax reads: what the command line exports, and what the library requires."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tunix_mlflow.config.schema import Config, TrainingConfig
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime import environment
from tunix_mlflow.runtime.environment import DETERMINISTIC_GPU, FAST_CPU, QUICK_CPU

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
        ("cpu", "", "--a=1", "--a=1"),  # resumed with the flags it began with
        ("gpu", "", None, ""),
        ("gpu", "", f"--a=1 {QUICK_CPU}", "--a=1"),  # which began on a CPU
        ("gpu", QUICK_CPU, None, QUICK_CPU),
    ],
)
def test_a_cpu_compiles_sooner(
    device: str, given: str, recorded: str | None, expected: str, tmp_path: Path
) -> None:
    """Where jax will find only a CPU, and neither the user nor a recorded run says otherwise."""
    device, _, plugin = device.partition(" ")
    if plugin:
        (tmp_path / "jax_plugins").mkdir()
    code = f"""
import os, sys
if not {plugin!r}:
    sys.modules["jax_plugins"] = sys.modules["libtpu"] = None
from tunix_mlflow.config.schema import Config
from tunix_mlflow.runtime.environment import export
recorded = {recorded!r}
export(Config(device={device!r}), None if recorded is None else dict(XLA_FLAGS=recorded))
print(os.environ["XLA_FLAGS"])
"""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, "XLA_FLAGS": given, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        check=True,
    )
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [("None", "3"), ("dict(NPROC='5')", "5"), ("dict(NPROC='')", "3")],
)
def test_a_resumed_run_has_its_number_of_threads(recorded: str, expected: str) -> None:
    """The recorded number wins, for bit-identity depends on it."""
    code = f"""
import os
from tunix_mlflow.config.schema import Config
from tunix_mlflow.runtime.environment import export, to_record
export(Config(), {recorded})
print(to_record()["NPROC"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "NPROC": "3"},
        check=True,
    )
    assert done.stdout == f"{expected}\n"


FAST = Config(device="cpu", training=TrainingConfig(fast_math=True))
DETERMINISTIC = Config(device="gpu", training=TrainingConfig(deterministic=True))


@pytest.mark.parametrize(
    ("config", "flags", "recorded", "missing"),
    [
        (Config(), "", None, None),
        (FAST, "", None, FAST_CPU),
        (FAST, FAST_CPU, None, None),
        (FAST, "--a=1", None, f"--a=1 {FAST_CPU}"),
        (FAST, "{file}", None, None),
        (Config(device="cpu"), "", f"--a=1 {FAST_CPU}", FAST_CPU),  # as the resumed run began
        (Config(device="cpu"), "", QUICK_CPU, None),  # does not change results
        (DETERMINISTIC, "", None, DETERMINISTIC_GPU),
        (DETERMINISTIC, DETERMINISTIC_GPU, None, None),
        (Config(device="cpu", training=TrainingConfig(deterministic=True)), "", None, None),
    ],
)
def test_the_library_sets_nothing_and_names_what_is_missing(
    config: Config,
    flags: str,
    recorded: str | None,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The variable, and the value to set before Python starts; the environment is unchanged."""
    (tmp_path / "flags.txt").write_text(FAST_CPU)
    monkeypatch.setenv("XLA_FLAGS", flags.format(file=tmp_path / "flags.txt"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    before = dict(os.environ)
    said = None
    try:
        environment.require(config, None if recorded is None else {"XLA_FLAGS": recorded})
    except ConfigError as error:
        said = str(error)
    if missing is None:
        assert said is None
    else:
        assert said is not None
        assert f"set XLA_FLAGS={missing!r} before Python starts" in said
    assert dict(os.environ) == before


def test_platforms_without_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are initialized there; the value to set is named."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError, match="set JAX_PLATFORMS=cuda,cpu before Python starts"):
        environment.require(Config())


DEVICES = """
import jax
from tunix_mlflow.config.schema import MeshConfig
from tunix_mlflow.errors import DeviceError
from tunix_mlflow.runtime import devices
if {used}:
    jax.devices()
first = devices.use("cpu", 2)
try:
    print(len(devices.group(first, 2)), devices.fingerprint(first, MeshConfig(data=2))["numerics"])
except DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize("used", [False, True])
def test_a_mesh_in_a_script(used: bool) -> None:
    """Virtual devices are made while jax has none; after that, the variable is named."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES.format(used=used)],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    if used:
        assert "set JAX_NUM_CPU_DEVICES=2 before Python starts" in done.stdout
    else:
        assert done.stdout.startswith("2 ")
