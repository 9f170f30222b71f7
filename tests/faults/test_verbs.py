"""Every command, stopped anywhere: run again, it does what it would have done undisturbed.

One call of the store is answered wrongly, or one operation on a file fails, or the process is
killed there. Afterwards the same command is run again: its result must be that of an undisturbed
one, and nothing may be left RUNNING, PENDING or half-deleted.

`make faults VERB=evaluate` (or VERB=all) tries every place, in at most twelve minutes a command;
`make test` a few.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.conftest import as_arguments, tiny, write_traces
from tests.faults.commands import Commands, kill
from tests.servers import RefusingProxy, Server, free_port
from tests.test_pretrained_runs import written
from tunix_mlflow.data.catalog import read
from tunix_mlflow.files import _MACHINE, sha256_file

VERB = os.environ.get("VERB")
SAMPLE = int(os.environ.get("FAULTS", "2"))
BUDGET_SECONDS = float(os.environ.get("FAULT_SECONDS", "660"))
TOGETHER = 2
KILLS = 50
FAILURES = 30  # of operations on files

MAIN_ANSWERS: tuple[int | str, ...] = (413, 403, 500, "reset")
MORE_ANSWERS: tuple[int | str, ...] = (
    *(401, 404, 409, 429, 507, "garbage", "redirect", "lost", "slow"),
)
_LEFTOVER = re.compile(
    r"/(\.deleting-[^/]*|tmp[a-z0-9_]{8}|\.scratch-[^/]*|\.[^/]*\.part(ial)?|[^/]*-tmp-\d+"
    r"|[^/]*\.orbax-checkpoint-tmp[^/]*)(/|$)|/(packages|staged|open)/."
)
_OWN_PARAMS = ("model", "base", "promotion.model")


class Fault(NamedTuple):
    """What happens, and before which call of the store or operation on a file, or when."""

    where: str  # store, file or time
    at: int  # from 1; of time, milliseconds from the start
    what: int | str

    def __str__(self) -> str:
        return f"{self.what} at {self.where} {self.at}"


class Case(NamedTuple):
    """One attempt, in a state root and an experiment of its own."""

    name: str
    home: Path
    folder: Path  # the current one

    @property
    def log(self) -> Path:
        return self.folder.parent / "log"


class Base(NamedTuple):
    """What all attempts begin with."""

    home: Path
    run_id: str  # of a trained and evaluated model
    pretrained: Path
    traces: Path
    offline: str  # the folder of a run that was recorded while the server was away


class Stand:
    """A place to run commands: a server behind a port that answers wrongly, and a fork server."""

    def __init__(self, server: Server, root: Path) -> None:
        self.commands, self.proxy = Commands(), RefusingProxy(server.uri, self._rule)
        self.client, self._uri, self.root = MlflowClient(server.uri), server.uri, root
        self._fault: Fault | None = None
        self._calls, self._pid = 0, 0
        self._lock = threading.Lock()

    def run(self, words: list[str], case: Case, fault: Fault | None = None) -> tuple[int, int, int]:
        """Return exit code, calls of the store, and operations on files of a command."""
        with self._lock:
            self._calls, self._fault = 0, fault
        of_file = fault is not None and fault.where == "file"
        code = self.commands.run(
            words,
            {
                "MLFLOW_TRACKING_URI": self.proxy.uri,
                "MLFLOW_EXPERIMENT_NAME": case.name,
                "TUNIX_MLFLOW_HOME": str(case.home),
            },
            case.log,
            folder=case.folder,
            watched=[str(case.home), str(case.folder)],
            at=fault.at if fault is not None and of_file else 0,
            fault=str(fault.what) if fault is not None and of_file else "kill",
            started=lambda pid: self._started(pid, fault),
        )
        with self._lock:
            self._fault = None
        operations = re.findall(r"operations: (\d+)", case.log.read_text())
        return code, self._calls, int(operations[-1]) if operations else 0

    def close(self) -> None:
        self.commands.close()
        self.proxy.close()

    def _started(self, pid: int, fault: Fault | None) -> None:
        self._pid = pid
        if fault is not None and fault.where == "time":
            time.sleep(fault.at / 1000)
            kill(pid)

    def _rule(self, method: str, path: str, length: int) -> int | str | None:
        if path == "/health":
            return None
        with self._lock:
            self._calls += 1
            fault, number = self._fault, self._calls
        if fault is None or fault.where != "store" or number != fault.at:
            return None
        if fault.what in ("kill", "kill after"):
            kill(self._pid)
            return "reset" if fault.what == "kill" else "lost"
        return fault.what


class Verb(NamedTuple):
    """A command: its words, what it needs first, and what it leaves."""

    words: Callable[[Base, Case], list[str]]
    begin: Callable[[Stand, Base, Case], None] = lambda stand, base, case: None
    result: Callable[[Stand, Case], Any] = lambda stand, case: None
    stage: str | None = None  # of its run


QUIET = ["tracking.system_metrics=false"]
TRAINING = tiny(
    dataset="golden-v2", training__save_every_steps="1", evaluation__samples="0",
    training__eval_every_steps="2", tracking__lease_seconds="2",
)  # fmt: skip


def _registry(stand: Stand, case: Case) -> Any:
    versions = stand.client.search_model_versions(f"name = '{case.name}'")
    return [
        (v.version, v.status, v.tags.get("tunix_mlflow.promotion"))
        for v in sorted(versions, key=lambda v: int(v.version))
    ], stand.client.get_registered_model(case.name).aliases


def _catalog(key: str) -> Callable[[Stand, Case], Any]:
    def result(_: Stand, case: Case) -> Any:
        manifest = read.find(case.home / "catalog.duckdb", key)
        assert manifest is not None
        return manifest.digest

    return result


def _written(_: Stand, case: Case) -> Any:
    return {
        str(path.relative_to(case.folder)): sha256_file(path)
        for path in sorted(case.folder.rglob("*"))
        if path.is_file()
    }


def _train_first(stand: Stand, base: Base, case: Case) -> None:
    words = ["train", "golden-v2", "checkpoints.keep_last=3", *as_arguments(TRAINING)]
    assert stand.run(words, case)[0] == 0, case.log.read_text()[-2000:]


def _checkpoints(stand: Stand, case: Case) -> Any:
    (run,) = stand.client.search_runs([_experiment(stand, case)])
    here = [p.name for p in (case.home / "runs" / run.info.run_id / "checkpoints").iterdir()]
    there = stand.client.list_artifacts(run.info.run_id, "checkpoints")
    return sorted(here), sorted(entry.path for entry in there)


def _recorded_away(stand: Stand, base: Base, case: Case) -> None:
    # The folder's name is the run's identity until MLflow has it.
    name = uuid.uuid4().hex
    (case.home / "runs" / base.offline).rename(case.home / "runs" / name)
    for marker in (case.home / "open").iterdir():
        marker.write_text(marker.read_text().replace(base.offline, name))


def _unreferenced(_: Stand, base: Base, case: Case) -> None:
    (case.home / "tmp").mkdir(exist_ok=True)
    left = case.home / "tmp" / f".scratch-{_MACHINE}-999999-a"
    left.mkdir()
    (left / "part.arrow").write_bytes(b"x" * 1000)


VERBS = {
    "seed": Verb(
        lambda base, case: ["seed", "golden-v2", "--num-traces", "60", "--key", "new-v1", *QUIET],
        result=_catalog("new-v1"),
        stage="seed",
    ),
    "train": Verb(
        lambda base, case: [
            *("train", "golden-v2", "--resume", "auto", f"tracking.key={case.name}"),
            *as_arguments(TRAINING | {"training.steps": "2", "training.save_every_steps": "2"}),
        ],
        stage="train",
    ),
    "evaluate": Verb(
        lambda base, case: ["evaluate", base.run_id, "--dataset", "golden-v2", *QUIET],
        stage="evaluate",
    ),
    "promote": Verb(
        lambda base, case: [
            *("promote", base.run_id, case.name, "promotion.thresholds={exact_match: 0.0}", *QUIET),
        ],
        result=_registry,
        stage="promote",
    ),
    "import": Verb(
        lambda base, case: ["models", "import", str(base.pretrained), "--max-new-tokens", "4"],
        stage="import",
    ),
    "export-model": Verb(
        lambda base, case: ["models", "export", base.run_id, "out"], result=_written
    ),
    "bench": Verb(
        lambda base, case: [
            *("bench", "golden-v2", "benchmark.steps=1", "benchmark.repeats=1"),
            *("benchmark.warmup_steps=1", *as_arguments(TRAINING)),
        ],
        stage="bench",
    ),
    "prune": Verb(
        lambda base, case: ["checkpoints", "prune", "--keep-last", "1", "--yes"],
        begin=_train_first,
        result=_checkpoints,
    ),
    "sync": Verb(lambda base, case: ["sync"], begin=_recorded_away),
    "ingest": Verb(
        lambda base, case: [
            "datasets",
            "ingest",
            str(base.traces),
            "--name",
            "mine",
            "--version",
            "v1",
        ],
        result=_catalog("mine-v1"),
    ),
    "build": Verb(
        lambda base, case: [
            *("datasets", "build", "--from", "golden-v2", "--name", "built", "--version", "v1"),
            *("--limit", "20"),
        ],
        result=_catalog("built-v1"),
    ),
    "export": Verb(
        lambda base, case: ["datasets", "export", "golden-v2", "out.jsonl"], result=_written
    ),
    "gc": Verb(lambda base, case: ["datasets", "gc", "--yes"], begin=_unreferenced),
}


@pytest.fixture(scope="module")
def stands(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Stand]]:
    root = tmp_path_factory.mktemp("stands")
    made = [Stand(server, root / f"stand{n}") for n in range(TOGETHER if VERB else 1)]
    yield made
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def base(stands: list[Stand], tmp_path_factory: pytest.TempPathFactory) -> Base:
    """What the commands work on."""
    stand, root = stands[0], tmp_path_factory.mktemp("base")
    name = f"base-{uuid.uuid4().hex[:8]}"
    case = Case(name, root / "base", root / "cwd-base")
    case.folder.mkdir(parents=True)

    def run(*words: str) -> None:
        code = stand.run(list(words), case)[0]
        assert code == 0, case.log.read_text()[-3000:]

    run("seed", "golden-v2", *QUIET)
    run("train", "golden-v2", *as_arguments(TRAINING))
    (trained,) = stand.client.search_runs(
        [_experiment(stand, case)], "tags.`tunix_mlflow.stage` = 'train'"
    )
    run("evaluate", trained.info.run_id, "--dataset", "golden-v2", *QUIET)
    traces = write_traces(root / "mine.jsonl", 50)
    return Base(case.home, trained.info.run_id, written(root / "pretrained"), traces, "")


def _with_run_recorded_away(stand: Stand, base: Base) -> Base:
    """Train, in a copy of the state root, while nothing listens where the server should be."""
    name = f"away-{uuid.uuid4().hex[:8]}"
    case = Case(name, stand.root / name / "home", stand.root / name / "cwd")
    shutil.copytree(base.home, case.home, symlinks=True)
    case.folder.mkdir()
    before = {path.name for path in (case.home / "runs").iterdir()}
    variables = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "MLFLOW_EXPERIMENT_NAME": case.name,
        "TUNIX_MLFLOW_HOME": str(case.home),
    }
    words = ["train", "golden-v2", *as_arguments(TRAINING)]
    assert stand.commands.run(words, variables, case.log, folder=case.folder) == 0
    (folder,) = {path.name for path in (case.home / "runs").iterdir()} - before
    return base._replace(home=case.home, offline=folder)


def _experiment(stand: Stand, case: Case) -> str:
    found = stand.client.get_experiment_by_name(case.name)
    return str(found.experiment_id) if found is not None else ""


def _runs(stand: Stand, case: Case) -> list[Run]:
    experiment = _experiment(stand, case)
    runs = list(stand.client.search_runs([experiment])) if experiment else []
    have = {run.info.run_id for run in runs}
    return runs + [stand.client.get_run(run_id) for run_id in _recorded(case.home) - have]


def _recorded(home: Path) -> set[str]:
    """The ids of the runs that a state root knows."""
    return {json.loads(link.read_text())["run_id"] for link in home.glob("runs/*/run.json")}


def _artifacts(stand: Stand, run_id: str, path: str | None = None) -> list[str]:
    found = []
    for entry in stand.client.list_artifacts(run_id, path):
        found += _artifacts(stand, run_id, entry.path) if entry.is_dir else [entry.path]
    return sorted(found)


def _metrics(run: Run, stand: Stand) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in run.data.metrics:
        if key.startswith(("train/", "validation/", "eval/")):
            points = stand.client.get_metric_history(run.info.run_id, key)
            found[key] = sorted((p.step, p.value) for p in points)
        elif not key.startswith("system/"):
            found[key] = None
    return found


def _of_run(stand: Stand, run: Run) -> dict[str, Any]:
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [stand.client.get_logged_model(output.model_id) for output in outputs]
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {
        "params": {k: v for k, v in run.data.params.items() if k not in _OWN_PARAMS},
        "metrics": _metrics(run, stand),
        "artifacts": [
            a for a in _artifacts(stand, run.info.run_id) if not a.startswith("checkpoints/")
        ],
        "models": [
            (str(m.status), m.name, m.tags.get("tunix_mlflow.content_digest"), len(m.metrics or []))
            for m in models
        ],
        "inputs": sorted((i.dataset.name, i.dataset.digest) for i in inputs),
        "tags": sorted(
            key
            for key in run.data.tags
            if key.startswith("tunix_mlflow.") and key != "tunix_mlflow.local_id"
        ),
    }


def _outcome(stand: Stand, verb: Verb, case: Case, skip: set[str]) -> Any:
    """What a command left that a second one would leave too."""
    finished = [
        run
        for run in _runs(stand, case)
        if run.info.status == "FINISHED" and run.info.run_id not in skip
    ]
    last = max(finished, key=lambda run: run.info.start_time, default=None)
    if verb.stage is not None:
        assert last is not None, "no FINISHED run"
    return verb.result(stand, case), None if last is None else _of_run(stand, last)


def _left(stand: Stand, case: Case) -> list[str]:
    """What should not be there."""
    left = [
        f"run {run.info.run_id} {run.info.status}"
        for run in _runs(stand, case)
        if run.info.status not in ("FINISHED", "KILLED", "FAILED")
    ]
    experiment = _experiment(stand, case)
    for model in stand.client.search_logged_models([experiment]) if experiment else ():
        if str(model.status) == "PENDING":
            left.append(f"model {model.model_id} PENDING of run {model.source_run_id}")
    for root in (case.home, case.folder):
        for path in root.rglob("*"):
            inside = f"/{path.relative_to(root)}"
            if _LEFTOVER.search(inside):
                left.append(inside)
    return left


def _begin(stand: Stand, base: Base, verb: Verb) -> Case:
    name = f"case-{uuid.uuid4().hex[:12]}"
    case = Case(name, stand.root / name / "home", stand.root / name / "cwd")
    shutil.copytree(base.home, case.home, symlinks=True)
    if verb is not VERBS["sync"]:
        shutil.rmtree(case.home / "runs")
    case.folder.mkdir()
    case.log.touch()
    verb.begin(stand, base, case)
    return case


def _attempt(
    stand: Stand, base: Base, verb: Verb, fault: Fault, expected: Any, skip: set[str]
) -> tuple[str, str | None]:
    """Return how the disturbed command ended, and what is wrong afterwards."""
    case = _begin(stand, base, verb)
    begun = case.log.stat().st_size if case.log.exists() else 0
    words = verb.words(base, case)
    code = stand.run(words, case, fault)[0]
    said = case.log.read_text()[begun:]
    ended = {-9: "killed", 9: "killed"}.get(code, f"exit {code}")
    wrong = None
    # These say something of a name, or are taken for a file; nothing else is the user's mistake.
    named = fault.what in (404, 409, "garbage", "redirect") or "MLFLOW_TRACKING_PASSWORD" in said
    allowed = (0, 2, 3, 4) if named else (0, 4)
    if ended != "killed" and (code not in allowed or "Traceback" in said):
        wrong = f"the disturbed one: {said[-1500:]}"
    elif code == 0 and "is not in MLflow" not in said:
        found = _outcome(stand, verb, case, skip)
        if found != expected:
            wrong = f"exit 0, and {_difference(found, expected)}; it said {said[-600:]}"
    if wrong is None:
        begun = case.log.stat().st_size
        again = stand.run(words, case)[0]
        said_again = case.log.read_text()[begun:]
        if fault.where == "file" and fault.what == "fail":
            _clean_files(stand, case)  # what could not be deleted stays, and is found
        if again == 2 and code in (0, 9, -9) and "exists" in said_again:
            again = 0  # it had been written
        if again != 0:
            wrong = f"again: exit {again}: {said_again[-1500:]}"
        else:
            found = _outcome(stand, verb, case, skip)
            if found != expected:
                wrong = f"again: {_difference(found, expected)}"
            elif left := _left(stand, case):
                wrong = f"left: {'; '.join(left[:4])}"
    if wrong is None:
        shutil.rmtree(case.home.parent)
    return ended, None if wrong is None else f"{wrong}\n   [first: {said[-400:]}]"


def _clean_files(stand: Stand, case: Case) -> None:
    # The server is everybody's here; without one, only files of this state root are deleted.
    variables = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "TUNIX_MLFLOW_HOME": str(case.home),
    }
    assert stand.commands.run(["clean", "--yes"], variables, case.log, folder=case.folder) == 4


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [k for k in {*found, *expected} if found.get(k) != expected.get(k)]
        return "; ".join(f"{k}: {_difference(found.get(k), expected.get(k))}" for k in keys)[:900]
    if isinstance(found, tuple) and isinstance(expected, tuple) and len(found) == len(expected):
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
        return "; ".join(_difference(a, b) for a, b in pairs)[:900]
    return f"{found} for {expected}"[:300]


def _faults(calls: int, operations: int, took: float) -> list[Fault]:
    """What is tried: every call with the main answers, others and kills sampled by seed.

    Args:
        calls: of the store.
        operations: on files, as Python sees them; DuckDB's and Orbax's are met by time.
        took: seconds of an undisturbed command.
    """
    rng = random.Random(17)
    every = [Fault("store", at, what) for at in range(1, calls + 1) for what in MAIN_ANSWERS]
    rng.shuffle(every)
    more = [
        Fault("store", at, what)
        for what in MORE_ANSWERS
        for at in rng.sample(range(1, calls + 1), min(calls, 4))
    ]
    places = [Fault("file", at, "kill") for at in range(1, operations + 1)]
    places += [
        Fault("store", at, what) for at in range(1, calls + 1) for what in ("kill", "kill after")
    ]
    kills = rng.sample(places, min(KILLS, len(places)))
    failures = [
        Fault("file", at, "fail")
        for at in rng.sample(range(1, operations + 1), min(FAILURES, operations))
    ]
    moments = [
        Fault("time", rng.randrange(1, int(1000 * took)), "kill")
        for _ in range(KILLS - len(kills) // 2)
    ]
    planned = [*kills, *failures, *moments, *more, *every]
    rng.shuffle(planned)  # a part of them is a sample
    return planned


# Not those that take long: recording a run while the server is away, and training one each time.
SAMPLED = [name for name in VERBS if name not in ("sync", "prune")]


@pytest.mark.parametrize("name", {None: SAMPLED, "all": [*VERBS]}.get(VERB, [VERB]))
def test_stopped_anywhere(name: str, stands: list[Stand], base: Base) -> None:
    """The same command again gives the same result, and nothing is left."""
    verb, first = VERBS[name], stands[0]
    if name == "sync":
        base = _with_run_recorded_away(first, base)
    skip = _recorded(base.home)
    whole = _begin(first, base, verb)
    begun = time.monotonic()
    code, calls, operations = first.run(verb.words(base, whole), whole)
    took = time.monotonic() - begun
    assert code == 0, whole.log.read_text()[-2000:]
    expected = _outcome(first, verb, whole, skip)
    assert _left(first, whole) == []
    planned = _faults(calls, operations, took)
    if not VERB:
        planned = random.Random(name).sample(planned, min(SAMPLE, len(planned)))
    waiting: queue.SimpleQueue[Fault] = queue.SimpleQueue()
    for fault in planned:
        waiting.put(fault)
    done: list[tuple[Fault, str, str | None]] = []
    until = time.monotonic() + BUDGET_SECONDS

    def work(stand: Stand) -> None:
        while time.monotonic() < until:
            try:
                fault = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.append((fault, *_attempt(stand, base, verb, fault, expected, skip)))
            except Exception:
                done.append((fault, "?", traceback.format_exc()[-1500:]))

    with ThreadPoolExecutor(len(stands)) as pool:
        for each in [pool.submit(work, stand) for stand in stands]:
            each.result()
    bad = [f"{fault} ({ended}): {wrong}" for fault, ended, wrong in done if wrong is not None]
    ends = Counter(ended for _, ended, _ in done)
    print(
        f"{name}: {len(done) - len(bad)} of {len(done)} came back"
        f" ({len(planned)} planned, of {calls} calls of the store and {operations} operations on"
        f" files); the disturbed ones: {dict(ends)}"
    )
    assert not bad, _grouped(bad)


def _grouped(bad: list[str]) -> str:
    """Failures that read alike, with one of each kind."""
    kinds: dict[str, list[str]] = {}
    for one in bad:
        kinds.setdefault(re.sub(r"[0-9a-f]{4,}|\d+", "#", one.partition("): ")[2])[:60], []).append(
            one
        )
    lines = []
    for ones in kinds.values():
        places = ", ".join(one.partition(" (")[0] for one in ones[:12])
        lines.append(f"{len(ones)} times ({places}): {ones[0][:1200]}")
    return "\n".join(lines)
