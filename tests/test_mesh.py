"""Several devices give what one gives; the same mesh gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, as_arguments, environment, last_json, tiny

MESHES = ("2x1", "4x1", "1x2", "1x4", "2x2")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What tests/meshes.py prints, on four virtual devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.meshes"],
        cwd=ROOT,
        env=environment({"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return last_json(done.stdout)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mesh_trains_as_one_device(found: dict[str, Any], optimizer: str, mesh: str) -> None:
    """Parameters and losses within 1e-6, twice the same bits, a share of the parameters each."""
    on_mesh = found[f"{optimizer} {mesh}"]
    assert on_mesh["distance"] < 1e-6
    assert on_mesh["loss"] < 1e-6
    assert on_mesh["again"]
    assert on_mesh["share"] == pytest.approx(1 / int(mesh[-1]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_moves_to_another_mesh(found: dict[str, Any], optimizer: str) -> None:
    """Restored bit for bit, spread as the new mesh wants it, and trained on."""
    moved = found[f"{optimizer} moved"]
    assert moved["exact"]
    assert moved["same_place"]
    assert moved["distance"] < 1e-6


def test_a_run_on_a_mesh(store: str, command: Callable[..., Any]) -> None:
    """The preset cpu-fast trains, says where, and goes on upon one device, which is said."""
    words = as_arguments(tiny(dataset="golden-v2", training__steps="2"))
    done = command("tunix-mlflow", "train", "cpu-fast", *words)
    assert done.returncode == 0, done.stderr
    run = MlflowClient().get_run(last_json(done.stdout)["run_id"])
    assert run.data.tags["tunix.mesh"] == "data=2,fsdp=1"
    assert "--xla_cpu_enable_fast_math=true" in run.data.tags["tunix.xla_flags"]
    more = ("training.steps=4", "mesh.data=1")
    resumed = command("tunix-mlflow", "resume", run.info.run_id, *more)
    assert resumed.returncode == 0, resumed.stderr
    assert "mesh data=2,fsdp=1, now data=1,fsdp=1" in resumed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh.data=3"], "training.batch_size=4 must be a multiple of"),
        (["mesh.fsdp=0"], "mesh.fsdp: expected int >= 1, got '0'"),
    ],
)
def test_a_mesh_that_cannot_be(command: Callable[..., Any], words: list[str], message: str) -> None:
    """One line, exit code 2."""
    done = command("tunix-mlflow", "train", "golden-v2", *as_arguments(tiny()), *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
