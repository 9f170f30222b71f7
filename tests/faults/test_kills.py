"""kill -9 at random moments of training: no run is lost, and the bits are those of an
uninterrupted one.

KILLS=200 (`make faults KILLS=200`) for the long count, CRASHES=all for a crash at every place. A
chain begins a run by a key of its own, and whoever comes after a kill resumes it by that key,
until it has finished.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import BIN, ROOT, as_arguments, as_parameters, environment, tiny
from tests.faults.commands import Commands, kill
from tests.servers import Server, free_port
from tunix_mlflow.tracking.runs.resume import uploaded_steps

KILLS = int(os.environ.get("KILLS", "4"))
ZOMBIES = max(2, KILLS // 10)
LOST_DISKS = max(1, KILLS // 10)
CRASHES = os.environ.get("CRASHES", str(max(2, KILLS // 4)))  # a number, or all
STEPS = 24
TOGETHER = 2  # victims at a time
RUN = tiny(
    dataset="golden-v2",
    training__steps=str(STEPS),
    training__eval_every_steps="8",
    training__save_every_steps="4",
    tracking__lease_seconds="2",
    evaluation__samples="0",
)


class Victims:
    """Trainings that can be killed."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._commands = Commands()
        self.close = self._commands.close

    def run(
        self,
        key: str,
        home: Path,
        moment: Callable[[], None] | None = None,
        crash_at: int = 0,
        started: Callable[[int], None] | None = None,
    ) -> int:
        """The exit code of a training that may be killed when `moment` returns, or die before one
        of its operations on files."""

        def killed(pid: int) -> None:
            if started is not None:
                started(pid)
            if moment is not None:
                moment()
                kill(pid)

        return self._commands.run(
            ["train", "golden-v2", "--resume", "auto", f"tracking.key={key}", *as_arguments(RUN)],
            {"TUNIX_MLFLOW_HOME": str(home)},
            self.log,
            at=crash_at,
            started=killed,
        )


Spawn = Callable[[], Victims]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Makes fork servers, each with a log of its own."""
    made: list[Victims] = []

    def one() -> Victims:
        made.append(Victims(tmp_path / f"log{len(made)}"))
        return made[-1]

    yield one
    for each in made:
        each.close()


@pytest.fixture
def team(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A tracking store, in words: a server on PostgreSQL and S3 where `make faults` gives one."""
    services = os.environ.get("TUNIX_SERVICES")
    if services is None:
        request.getfixturevalue("store")
        yield "SQLite and a folder"
        return
    words = [services, str(ROOT / "tests/faults/services.py"), str(free_port())]
    with subprocess.Popen(
        [*words, str(tmp_path / "server.log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        assert uri.startswith("http://127.0.0.1"), (tmp_path / "server.log").read_text()[-2000:]
        os.environ["MLFLOW_TRACKING_URI"] = uri
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield "PostgreSQL and S3"
        process.communicate()
    del os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


def of_key(key: str) -> str:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`tunix_mlflow.key` = '{key}'")
    return str(run.info.run_id)


def outcome(key: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """Digest of the weights, and (step, value) of every train/* and validation/* metric."""
    client = MlflowClient()
    run = client.get_run(of_key(key))
    assert run.info.status == "FINISHED"
    keys = [k for k in run.data.metrics if k.startswith(("train/", "validation/"))]
    history = {
        k: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, k))
        for k in keys
    }
    assert len(history["train/loss"]) == STEPS
    return run.data.tags["tunix_mlflow.weights_digest"], history


def test_any_death_comes_back_bit_for_bit(store: str, spawn: Spawn, home: Path) -> None:
    """Killed again and again, on one disk, at moments from the start to the end."""
    first, begun = spawn(), time.monotonic()
    assert first.run("whole", home) == 0, first.log.read_text()[-2000:]
    took = time.monotonic() - begun
    expected = outcome("whole")
    others = [spawn() for _ in range(TOGETHER - 1)]
    lock, kills, chains, moments = threading.Lock(), 0, 0, Counter[str]()

    def moment(key: str, rng: random.Random) -> Callable[[], None]:
        """Any time, or, as often, one that begins when the run has begun."""
        amid, after = rng.random() < 0.5, rng.random()

        def wait() -> None:
            begun = time.monotonic()
            while amid and time.monotonic() < begun + took:
                if _moment(home, key) != "before the run":
                    break
                time.sleep(0.02)
            time.sleep((0.5 * after if amid else 0.05 + 1.05 * after) * took)

        return wait

    def chain(victims: Victims, number: int) -> None:
        """One run, killed until it gets through."""
        nonlocal kills
        key, rng = f"chain{number}", random.Random(f"{KILLS} {number}")
        while True:
            code = victims.run(key, home, None if kills >= KILLS else moment(key, rng))
            if code == 0:
                break
            assert code == -signal.SIGKILL, victims.log.read_text()[-3000:]
            with lock:
                kills += 1
                moments[_moment(home, key)] += 1
        assert outcome(key) == expected

    def work(victims: Victims) -> None:
        nonlocal chains
        while kills < KILLS:
            with lock:
                number = chains
                chains += 1
            chain(victims, number)

    with ThreadPoolExecutor(TOGETHER) as pool:
        for done in [pool.submit(work, each) for each in (first, *others)]:
            done.result()
    shutil.rmtree(home / "runs")
    print(
        f"{kills} kills in {chains} runs: {chains} of {chains} finished bit for bit; 0 of {kills}"
        f" lost (95 %: below {3 / kills:.1%}); {dict(moments)}"
    )
    for each in (first, *others):
        assert "not the same as before" not in each.log.read_text()


def _moment(home: Path, key: str) -> str:
    """Where a run was when it was killed, roughly."""
    for config in home.glob("runs/*/config.json"):
        if f'"key":"{key}"' not in config.read_text():
            continue
        saves = (p for p in config.parent.glob("checkpoints/*") if p.name.isdigit())
        torn = not all((p / "manifest.json").exists() for p in saves)
        return "amid a save" if torn else "in the run"
    return "before the run"


def test_a_crash_before_any_operation(store: str, spawn: Spawn, home: Path) -> None:
    """Dead before a rename, a removal, a mkdir or an opening for writing, of ours or Orbax's, in a
    run's folder: the run comes back anyway."""
    first = spawn()
    assert first.run("whole", home) == 0, first.log.read_text()[-2000:]
    expected = outcome("whole")
    total = int(re.findall(r"operations: (\d+)", first.log.read_text())[-1])
    places = list(range(1, total + 1))
    if CRASHES != "all":
        places = random.Random(3).sample(places, int(CRASHES))
    waiting, crashed = iter(places), []

    def work(victims: Victims) -> None:
        for at in waiting:
            key = f"crash{at}"
            code = victims.run(key, home, crash_at=at)
            # Threads may do less than in the first run: then the last places are not reached.
            assert code == 9 or (code == 0 and at > 0.9 * total)
            crashed.append(code == 9)
            assert victims.run(key, home) == 0, victims.log.read_text()[-3000:]
            assert outcome(key) == expected

    with ThreadPoolExecutor(TOGETHER) as pool:
        for done in [pool.submit(work, each) for each in (first, spawn())]:
            done.result()
    print(f"{sum(crashed)} of {sum(crashed)} crashes survived, of {total} places")


def has_uploaded(key: str) -> bool:
    """Whether MLflow has a whole checkpoint of a run."""
    try:
        run_id = of_key(key)
    except ValueError:  # MLflow has not heard of it
        return False
    return bool(uploaded_steps(MlflowClient(), run_id))


def test_a_lost_disk_goes_on_elsewhere(team: str, spawn: Spawn, tmp_path: Path) -> None:
    """Killed, and everything on the machine is gone: another continues from what was uploaded."""
    victims, begun = spawn(), time.monotonic()
    assert victims.run("whole", tmp_path / "first") == 0, victims.log.read_text()[-2000:]
    took = time.monotonic() - begun
    expected = outcome("whole")
    rng, client, points = random.Random(1), MlflowClient(), 0
    for n in range(LOST_DISKS):
        key, here, there = f"lost{n}", tmp_path / f"here{n}", tmp_path / f"there{n}"

        def moment(key: str = key, first: bool = n == 0) -> None:
            after, begun = rng.uniform(0.3, 1.0) * took, time.monotonic()
            while time.monotonic() < begun + (took if first else after):
                if first and has_uploaded(key):
                    return
                time.sleep(0.02)

        victims.run(key, here, moment)
        shutil.rmtree(here)
        try:
            run_id = of_key(key)
        except ValueError:  # killed before MLflow heard of it
            run_id = None
        shipped = client.get_metric_history(run_id, "train/loss") if run_id else []
        assert victims.run(key, there) == 0, victims.log.read_text()[-3000:]
        assert outcome(key) == expected
        after = client.get_metric_history(of_key(key), "train/loss")
        kept = {(m.step, m.value, m.timestamp) for m in after}
        assert {(m.step, m.value, m.timestamp) for m in shipped} <= kept
        points += len(shipped)
    fetched = victims.log.read_text().count("fetched the checkpoint")
    assert fetched or LOST_DISKS == 1  # a quick one may have come to its end before the kill
    print(
        f"{team}: {LOST_DISKS} of {LOST_DISKS} runs were resumed elsewhere, {fetched} from an"
        f" uploaded checkpoint; 0 of {points} shipped points of train/loss lost, 0 doubled"
    )


def test_a_zombie_never_writes(
    server: Server, spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped past its lease, while another machine resumes and finishes the run; continued then,
    it changes nothing of the run, and says that it lost it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    mlflow.set_tracking_uri(server.uri)
    victims, rescuers, rng = spawn(), spawn(), random.Random(11)
    client, stopped, wrote = MlflowClient(), 0, []
    try:
        for n in range(10 * ZOMBIES):
            if stopped >= ZOMBIES:
                break
            key, there = f"{tmp_path.name}-{n}", tmp_path / f"there{n}"
            before: Any = None

            def started(pid: int, key: str = key, there: Path = there) -> None:
                nonlocal before
                until = time.monotonic() + 60
                while not (found := _runs_of(client, key)) and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 1.5))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if client.get_run(found[0]).info.status == "RUNNING":
                        assert rescuers.run(key, there) == 0, rescuers.log.read_text()[-2000:]
                        before = _everything(client, key)
                    os.kill(pid, signal.SIGCONT)

            code = victims.run(key, tmp_path / f"here{n}", started=started)
            if before is None:
                continue  # it had ended
            stopped += 1
            assert code in (0, 4), victims.log.read_text()[-2000:]
            if (after := _everything(client, key)) != before:
                wrote.append(_changes(before, after))
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    print(f"{stopped - len(wrote)} of {stopped} zombies wrote nothing")
    assert stopped == ZOMBIES
    assert not wrote, str(wrote)[:3000]


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is there of each kind in one of two states only."""
    found = {}
    for key in {*before, *after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, list) and isinstance(new, list):
            old, new = [x for x in old if x not in new], [x for x in new if x not in old]
        if old != new:
            found[key] = old, new
    return found


def _runs_of(client: MlflowClient, key: str) -> list[str]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`tunix_mlflow.key` = '{key}'")
    return [run.info.run_id for run in found]


def _everything(client: MlflowClient, key: str) -> dict[str, Any]:
    """All that MLflow has of a run, but for its lease."""
    (run_id,) = _runs_of(client, key)
    run = client.get_run(run_id)
    found: dict[str, Any] = {
        "info": (run.info.status, run.info.end_time),
        "tags": {k: v for k, v in run.data.tags.items() if k != "tunix_mlflow.lease"},
        "params": run.data.params,
        "models": sorted(
            (model.model_id, str(model.status))
            for model in client.search_logged_models(
                [run.info.experiment_id], f"source_run_id = '{run_id}'"
            )
        ),
    }
    for metric in run.data.metrics:
        points = client.get_metric_history(run_id, metric)
        found[metric] = sorted((p.step, p.timestamp, p.value) for p in points)
    folders: list[str | None] = [None]
    files: list[tuple[str, int | None]] = []
    while folders:
        for entry in client.list_artifacts(run_id, folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                files.append((entry.path, entry.file_size))
    return found | {"artifacts": sorted(files)}


@pytest.mark.long
def test_a_killed_mlflow_run_comes_back(store: str) -> None:
    """kill -9 of `mlflow run` and its child together; the next `mlflow run` resumes."""

    def go(key: str, after: float | None) -> bool:
        """Whether it was killed."""
        words = [str(BIN / "mlflow"), "run", str(ROOT), "-e", "train", "--env-manager", "local"]
        words += ["-P", "resume=auto", "-P", f"tracking.key={key}", *as_parameters(RUN)]
        with subprocess.Popen(
            words,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                _, said = process.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return True
        assert process.returncode == 0, said[-3000:]
        return False

    begun = time.monotonic()
    go("whole", None)
    took = time.monotonic() - begun
    expected, rng, kills, runs = outcome("whole"), random.Random(5), 0, 0
    while kills < 5:
        key = f"project{runs}"
        runs += 1
        while go(key, rng.uniform(0.4, 1.0) * took if kills < 5 else None):
            kills += 1
        assert outcome(key) == expected
    print(f"mlflow run: {kills} kills in {runs} runs: {runs} of {runs} finished bit for bit")
