"""Several devices give what one gives; the same mesh gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, as_arguments, environment, last_json, tiny

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # as `quick_compile` does


def test_a_mesh_trains_as_one_device() -> None:
    """Parameters and losses within 1e-6, twice the same bits, a share of the parameters each; a
    checkpoint moves to another mesh, and to one device, bit for bit, and is trained on there.
    Adapters too, and in a loop over the blocks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.meshes"],
        cwd=ROOT,
        env=environment(
            {
                "JAX_NUM_CPU_DEVICES": "4",
                "JAX_PLATFORMS": "cpu",
                **QUICK,
            }
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = last_json(done.stdout)
    moved = found.pop("moved")
    assert found.pop("adapted") < 1e-6
    assert found.pop("scanned") < 1e-6
    assert set(found) == {"adamw 2x1", "adamw 1x4", "adamw 2x2", "muon 2x2"}
    for name, on_mesh in found.items():
        assert on_mesh["distance"] < 1e-6, name
        assert on_mesh["loss"] < 1e-6, name
        assert on_mesh["again"], name
        assert on_mesh["share"] == pytest.approx(1 / int(name[-1])), name
    assert set(moved) == {"1x4", "1x1"}
    for name, there in moved.items():
        assert there["exact"], name
        assert there["same_place"], name
        assert there["distance"] < 1e-6, name


def test_a_run_on_a_mesh(store: str, command: Callable[..., Any]) -> None:
    """Training on two devices says where, and is resumed on four, which is said."""
    small = {"training__steps": "2", "evaluation__samples": "0", "mesh__data": "2"}
    words = as_arguments(tiny(dataset="golden-v2", **small))
    done = command("tunix-mlflow", "train", "cpu-fast", *words, env=QUICK)
    assert done.returncode == 0, done.stderr
    run = MlflowClient().get_run(last_json(done.stdout)["run_id"])
    assert run.data.tags["tunix_mlflow.mesh"] == "data=2,fsdp=1"
    assert "--xla_cpu_enable_fast_math=true" in run.data.tags["tunix_mlflow.xla_flags"]
    resumed = command(
        *("tunix-mlflow", "resume", run.info.run_id),
        *("training.steps=4", "mesh.data=1", "mesh.fsdp=4"),
        env=QUICK,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "mesh data=2,fsdp=1, now data=1,fsdp=4" in resumed.stderr
    assert "microbatch_size 2, now 1" in resumed.stderr


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
