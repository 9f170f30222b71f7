"""Many trainings at once on a database that does not exist yet."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BIN, ROOT, as_arguments, environment, last_json, tiny, write_traces
from tests.faults.commands import Commands
from tests.test_pretrained_runs import written

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


@pytest.mark.long
def test_eight_of_each_command_at_once(tmp_path: Path) -> None:
    """Each command in turn, and then all of them mixed, eight at a time, on one catalog and a store
    that does not exist yet: no error reaches a user, and nothing is made twice or left open."""
    home, uri = tmp_path / "home", f"sqlite:///{tmp_path}/mlflow.db"
    traces = write_traces(tmp_path / "mine.jsonl", 40)
    pretrained = written(tmp_path / "pretrained")
    runners = [Commands() for _ in range(8)]
    client = MlflowClient(uri)
    small = as_arguments(tiny(dataset="golden-v2", evaluation__samples="0"))
    quiet = "tracking.system_metrics=false"

    def at_once(*words: list[str]) -> None:
        def one(number: int) -> int:
            folder = tmp_path / f"cwd{number}"
            folder.mkdir(exist_ok=True)
            variables = {"MLFLOW_TRACKING_URI": uri, "TUNIX_MLFLOW_HOME": str(home)}
            log = folder.with_suffix(".log")
            log.unlink(missing_ok=True)
            return runners[number].run(words[number], variables, log, folder=folder)

        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(one, range(8)))
        said = [(tmp_path / f"cwd{n}.log").read_text()[-1500:] for n in range(8) if codes[n]]
        assert not said, (words[0], said)

    try:
        at_once(*[["seed", "golden-v2", quiet]] * 8)
        ingest = ["datasets", "ingest", str(traces), "--version", "v1"]
        at_once(*[[*ingest, "--name", f"mine{n}"] for n in range(8)])
        at_once(*[["train", "golden-v2", f"tracking.key=run{n}", *small] for n in range(8)])
        ids = [e.experiment_id for e in client.search_experiments()]
        model = client.search_runs(ids, "tags.`tunix_mlflow.key` = 'run0'")[0].info.run_id
        gate = "promotion.thresholds={exact_match: 0.0}"
        kinds: dict[str, Callable[[int], list[str]]] = {
            "evaluate": lambda n: ["evaluate", model, "--dataset", "golden-v2", quiet],
            "promote": lambda n: ["promote", model, "crowd", gate, quiet],
            "import": lambda n: ["models", "import", str(pretrained), "--max-new-tokens", "4"],
            "export a model": lambda n: ["models", "export", model, f"out{uuid.uuid4().hex}"],
            "build": lambda n: ["datasets", "build", "--name", "built", "--version", "v1"],
            "export": lambda n: ["datasets", "export", "golden-v2", "out.jsonl"],
            "gc": lambda n: ["datasets", "gc", "--yes"],
            "prune": lambda n: ["checkpoints", "prune", "--yes"],
            "sync": lambda n: ["sync"],
            "clean": lambda n: ["clean", "--yes"],
            "list": lambda n: ["runs", "list"],
            "bench": lambda n: [
                *("bench", "golden-v2", "benchmark.steps=1", "benchmark.repeats=1", *small),
            ],
        }
        for words in kinds.values():
            at_once(*[words(n) for n in range(8)])
        mixed = list(kinds.values())
        for begin in range(0, len(mixed), 4):
            at_once(*[mixed[(begin + n) % len(mixed)](n) for n in range(8)])
    finally:
        for each in runners:
            each.close()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}
    models = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
    assert {str(model.status) for model in models} == {"READY"}
    versions = client.search_model_versions("name = 'crowd'")
    assert len(versions) == 1, [version.tags for version in versions]
    print(
        f"{3 + len(kinds)} commands, eight at a time, and {-(-len(mixed) // 4)} mixtures: 0 errors;"
        f" {len(runs)} of {len(runs)} runs are FINISHED"
    )
