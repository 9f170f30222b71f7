"""The forecast of a training step's memory, against what XLA reserves."""

from __future__ import annotations

import msgspec
import pytest

from tunix_mlflow.config.load import load_config
from tunix_mlflow.config.schema import LoraConfig, ModelConfig
from tunix_mlflow.runtime import devices
from tunix_mlflow.training import memory
from tunix_mlflow.training.resolve import resolve_auto
from tunix_mlflow.training.spec import step_spec
from tunix_mlflow.training.trainer import lower_step

pytestmark = pytest.mark.usefixtures("quick_compile")
VOCABULARY, LENGTH = 2048, 128


# Each pair of rematerialization, scanned layers, fused projections and adapters; the fused form
# has no adapters.
@pytest.mark.parametrize(
    ("remat", "scan", "fused", "rank"),
    [
        ("none", "false", "false", 0),
        ("none", "false", "true", 0),
        ("none", "true", "false", 4),
        ("dots", "true", "true", 0),
        ("dots", "false", "false", 4),
        ("block", "true", "false", 0),
        ("block", "false", "true", 0),
        ("block", "true", "false", 4),
    ],
)
def test_the_forecast_is_near_what_xla_reserves(
    remat: str, scan: str, fused: str, rank: int
) -> None:
    """Temporaries and state of the compiled step, within a third."""
    model = ModelConfig(
        layers=4, width=128, heads=4, kv_heads=2, mlp_width=344, vocab_size=VOCABULARY
    )
    overrides = {
        "device": "cpu",
        "data.sequence_length": str(LENGTH),
        "training.batch_size": "4",
        "training.microbatch_size": "4",
        "training.remat": remat,
        "training.scan_layers": scan,
        "training.fused": fused,
        "training.loss_chunk": "0",
    }
    config = load_config(None, overrides)
    config = msgspec.structs.replace(config, model=model, base="there", lora=LoraConfig(rank=rank))
    cpu = devices.use("cpu")
    config = resolve_auto(config, VOCABULARY, "cpu")
    spec = step_spec(config, VOCABULARY, cpu)
    sizes = lower_step(spec, config, VOCABULARY, cpu).compile().memory_analysis()
    assert sizes is not None
    reserved = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    assert memory.forecast(config, VOCABULARY).total == pytest.approx(reserved, rel=1 / 3)
