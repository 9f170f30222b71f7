"""Many trainings at once on a database that does not exist yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BIN, ROOT, as_arguments, environment, last_json, tiny

PROGRAM = """
import os, sys
from pathlib import Path
from tunix_mlflow.tracking.run import start_run  # loaded once, so that the eight begin together

def one(number):
    os.environ["TUNIX_MLFLOW_HOME"] = str(Path(sys.argv[1]) / f"home{number}")
    with start_run(log_system_metrics=False) as run:
        for step in range(1, 101):
            run.log_metrics({"train/loss": float(step + number)}, step=step)
    (Path(sys.argv[1]) / f"run{number}").write_text(run.run_id)

children = []
for number in range(8):
    children.append(os.fork())
    if children[-1] == 0:
        one(number)
        sys.stderr.flush()
        os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def together(uri: str, folder: Path, commands: list[list[str]]) -> list[tuple[str, str]]:
    """stdout and stderr of programs that ran at the same time and succeeded."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(
                {"MLFLOW_TRACKING_URI": uri, "TUNIX_MLFLOW_HOME": str(folder / f"home{n}")}
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, command in enumerate(commands)
    ]
    done = [process.communicate(timeout=480) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(commands), [err[-800:] for _, err in done]
    for _, err in done:
        assert "not recorded" not in err
        assert "sync" not in err
    return done


def test_eight_at_once_on_a_fresh_database(tmp_path: Path) -> None:
    """No lock and no migration error, and every point of each is there, once."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    together(uri, tmp_path, [[sys.executable, "-c", PROGRAM, str(tmp_path)]])
    client = MlflowClient(uri)
    for n in range(8):
        run_id = (tmp_path / f"run{n}").read_text()
        found = client.get_metric_history(run_id, "train/loss")
        assert sorted((m.step, m.value) for m in found) == [
            (s, float(s + n)) for s in range(1, 101)
        ]
        assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.long
def test_eight_trainings_on_a_fresh_database(tmp_path: Path) -> None:
    """The same of whole trainings: every step of each, and the same losses."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["train", "golden-v2", *as_arguments(tiny(training__steps="40"))]
    commands = [[str(BIN / "tunix-mlflow"), *words]] * 8
    client, losses = MlflowClient(uri), []
    for out, _ in together(uri, tmp_path, commands):
        run_id = last_json(out)["run_id"]
        found = client.get_metric_history(run_id, "train/loss")
        losses.append(sorted((m.step, m.value) for m in found))
        assert client.get_run(run_id).info.status == "FINISHED"
    assert [step for step, _ in losses[0]] == list(range(1, 41))
    assert losses == [losses[0]] * 8
    print("8 of 8 trainings started together on a fresh database: 320 of 320 points, once each")
