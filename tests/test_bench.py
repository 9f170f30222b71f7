"""`bench`: what it counts; `bench compare`: a drop beyond the noise exits with 3."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from tests.conftest import as_arguments, last_json, run_here, tiny
from tunix_mlflow.benchmarks import compare, train
from tunix_mlflow.config.schema import ModelConfig
from tunix_mlflow.models import decoder

Command = Callable[..., subprocess.CompletedProcess[str]]
RATES = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=5)


def test_flops_of_a_known_shape() -> None:
    """The shape of our anchors: 3.03 million parameters, 21.4 MFLOP a token at 256."""
    model = ModelConfig(layers=4, width=256, heads=4, kv_heads=2, mlp_width=688)
    count = decoder.parameter_count(decoder.shape(model, 512)[1])
    assert count == pytest.approx(3.03e6, rel=0.01)
    assert train.flops_per_token(count, model, 256) == pytest.approx(21.4e6, rel=0.01)


def test_the_train_suite(store: str, command: Command) -> None:
    """Real steps by the real command: figures that fit together; repeats, single steps, the params
    that the suite reads and its dataset in MLflow."""
    chosen = tiny(
        benchmark__steps="3",
        benchmark__repeats="2",
        mesh__data="2",
        data__sequence_length="256",
    )
    done = command("tunix-mlflow", "bench", "golden-v2", *as_arguments(chosen))
    assert done.returncode == 0, done.stderr
    figures = last_json(done.stdout)
    assert 0 < figures["tokens_per_sec"] <= figures["padded_tokens_per_sec"]
    assert figures["step_p50_ms"] <= figures["step_p95_ms"]
    assert figures["mfu"] == statistics.median(figures["mfus"])
    tokens = int(chosen["training.batch_size"]) * int(chosen["data.sequence_length"])
    for mfu, ms, peak in zip(
        figures["mfus"], figures["step_times_ms"], figures["gemm_peaks_gflops"], strict=True
    ):
        assert mfu == pytest.approx(tokens / ms * figures["flops_per_token"] / 1e6 / peak)
    assert figures["gemm_peak_gflops"] == statistics.median(figures["gemm_peaks_gflops"])
    assert figures["peak_host_mb"] > 50
    client = MlflowClient()
    assert compare.repeats(client, figures["run_id"]) == {
        "tokens_per_sec": figures["tokens_per_secs"],
        "step_time_ms": figures["step_times_ms"],
    }
    singles = client.get_metric_history(figures["run_id"], "perf/single_step_ms")
    assert [m.value for m in singles] == figures["steps_ms"]
    recorded = client.get_run(figures["run_id"])
    params = recorded.data.params
    assert params["benchmark.suite"] == "train"
    assert params["training.batch_size"] == chosen["training.batch_size"]
    assert len(params) <= 30
    assert not [key for key in params if key.startswith(("evaluation.", "tracking.", "promotion."))]
    assert recorded.inputs is not None
    (used,) = recorded.inputs.dataset_inputs
    assert used.dataset.name == "golden-v2/train"
    assert [tag.value for tag in used.tags] == ["benchmark"]


@pytest.mark.parametrize(
    ("name", "run", "baseline", "fell"),
    [
        ("tokens_per_sec", [80, 81, 82], [100, 101, 102], True),
        ("tokens_per_sec", [96, 97, 98], [100, 101, 102], False),  # by less than 5 %
        ("tokens_per_sec", [80, 81, 103], [100, 101, 102], False),  # one repeat reached it
        ("tokens_per_sec", [120, 121, 122], [100, 101, 102], False),
        ("step_time_ms", [120, 121, 122], [100, 101, 102], True),
        ("step_time_ms", [80, 81, 82], [100, 101, 102], False),
    ],
)
def test_a_drop_is_told_from_noise(
    name: str, run: list[float], baseline: list[float], fell: bool
) -> None:
    """Worse by more than allowed, and apart from the baseline's repeats."""
    (change,) = compare.compare({name: run, "mine": [1.0]}, {name: baseline}, 0.05)
    assert change.fell is fell


@given(RATES, RATES)
def test_never_both_ways(a: list[float], b: list[float]) -> None:
    """A run that fell below another: that one did not fall below it. Nor any below itself."""
    there = compare.compare({"x_per_sec": a}, {"x_per_sec": b}, 0.0)[0]
    back = compare.compare({"x_per_sec": b}, {"x_per_sec": a}, 0.0)[0]
    assert not (there.fell and back.fell)
    assert not compare.compare({"x_ms": a}, {"x_ms": a}, 0.0)[0].fell


def recorded_rates(*rates: float) -> str:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    for step, rate in enumerate(rates, start=1):
        client.log_metric(run_id, "repeat/tokens_per_sec", rate, step=step)
    return str(run_id)


def test_the_command(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Result, exit code, JSON, and a baseline by name that only a run that passed replaces."""

    def bench(*arguments: str) -> tuple[int, str, str]:
        code = run_here("bench", "compare", *arguments)
        return code, *capsys.readouterr()

    first, same, slow = (
        recorded_rates(*rates) for rates in ((100, 101, 102), (99, 100, 103), (70, 71, 72))
    )
    assert bench(same, "--baseline", first, "--accept", "main")[0] == 0
    code, out, error = bench(slow, "--baseline", "@main", "--accept", "main", "--json")
    assert code == 3
    assert "tokens_per_sec fell by more than 5%" in error
    assert json.loads(out)[0]["drop"] == pytest.approx(0.29)
    assert "by more than 2.5%" in bench(slow, "--baseline", "@main", "--max-drop", "2.5%")[2]
    assert bench(slow, "--baseline", "@main", "--max-drop", "40%")[0] == 0
    code, _, error = bench(recorded_rates(0.0), "--baseline", "@main")
    assert code == 2
    assert "tokens_per_sec is 0 in one of the runs" in error
    assert compare.resolve(MlflowClient(), "@main") == same
    assert bench(first, "--baseline", "@main", "--accept", "main")[0] == 0
    assert compare.resolve(MlflowClient(), "@main") == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--baseline", "nothing"], "there is no run 'nothing'"),
        (["nothing", "--baseline", "@never"], "no run is the baseline 'never'"),
        (["a", "--baseline", "b", "--max-drop", "much"], "expected a percentage such as 5%"),
        (["a"], "Missing option '--baseline'"),
    ],
)
def test_a_mistake_is_one_line(
    store: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Exit code 2, and what to give."""
    assert run_here("bench", "compare", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
