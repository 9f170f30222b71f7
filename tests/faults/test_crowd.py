"""Many trainings at once on a database that does not exist yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, environment

PROGRAM = """
import sys
from tunix_mlflow import session
from tunix_mlflow.config import Config, TrackingConfig
config = Config(tracking=TrackingConfig(system_metrics=False))
with session(config, stage="train") as run:
    for step in range(1, 101):
        run.write_scalars(step, {"train/loss": step + float(sys.argv[1])})
print(run.run_id)
"""


def test_eight_at_once_on_a_fresh_database(tmp_path: Path) -> None:
    """No lock and no migration error, and every point of each is there, once."""
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    (tmp_path / "fresh").mkdir()
    extra = {"MLFLOW_TRACKING_URI": uri}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(n)],
            cwd=ROOT,
            env=environment(extra | {"TUNIX_MLFLOW_HOME": str(tmp_path / f"home{n}")}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    done = [process.communicate(timeout=240) for process in processes]
    assert [p.returncode for p in processes] == [0] * 8, [err[-800:] for _, err in done]
    client = MlflowClient(uri)
    for n, (out, err) in enumerate(done):
        assert "not recorded" not in err
        assert "sync" not in err
        run_id = out.split()[-1]
        found = client.get_metric_history(run_id, "train/loss")
        assert sorted((m.step, m.value) for m in found) == [
            (s, float(s + n)) for s in range(1, 101)
        ]
        assert client.get_run(run_id).info.status == "FINISHED"
