"""Kills at random moments, and many at once. TUNIX_FAULTS=50 (make faults) runs the long counts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import environment, write_traces
from tunix_mlflow import paths
from tunix_mlflow.cli.main import cli  # noqa: F401  (loaded before processes are counted)
from tunix_mlflow.data import datasets, snapshot
from tunix_mlflow.data.catalog import read

COUNT = int(os.environ.get("TUNIX_FAULTS", "4"))
SECONDS = 60 if COUNT >= 50 else 4

WORK = {
    "ingest": "datasets.ingest(Path(FILE), KEY)",
    "ingest in spans": "parsing.SPAN_BYTES = 100_000; datasets.ingest(Path(FILE), KEY)",
    "build": "datasets.build(KEY, Selection(order='random'))",
    "export": "datasets.export('base-v1', Path(FILE + '.out.jsonl'))",
}


def start(code: str) -> subprocess.Popen[bytes]:
    head = (
        "from pathlib import Path\n"
        "from tunix_mlflow.data import datasets, parsing\n"
        "from tunix_mlflow.data.manifest import Selection\n"
        "print('ready', flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("work", WORK)
def test_a_kill_leaves_all_or_nothing(work: str, tmp_path: Path) -> None:
    """kill -9 at any moment: the dataset is whole or absent, and what was there verifies."""
    datasets.ingest(write_traces(tmp_path / "base.jsonl", 3_000), "base-v1")
    path = write_traces(tmp_path / "more.jsonl", 3_000, start=5_000)
    rng = random.Random(work)
    took = 1.0
    outcomes = {"all": 0, "nothing": 0}
    for n in range(COUNT):
        key = f"new-v{n}"
        code = WORK[work].replace("KEY", repr(key)).replace("FILE", repr(str(path)))
        process = start(code)
        assert process.stdout is not None
        process.stdout.readline()
        begun = time.monotonic()
        if n:
            time.sleep(rng.uniform(0, took))
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if not n:
            took = 1.2 * (time.monotonic() - begun)
        if work == "export":
            out = Path(f"{path}.out.jsonl")
            there = out.exists()
            assert not there or len(out.read_text().splitlines()) == 3_000
            out.unlink(missing_ok=True)
        else:
            there = read.find(paths.catalog_path(), key) is not None
            if there:
                report = datasets.verify(key)
                assert report.ok, report.summary()
        outcomes["all" if there else "nothing"] += 1
        assert datasets.verify("base-v1").ok
    assert sum(outcomes.values()) == COUNT
    print(f"{work}: {COUNT} of {COUNT} all or nothing ({outcomes})")
    for path, _ in datasets.leftovers():
        assert path.name.startswith(".scratch-")


def test_readers_and_a_writer_at_once(tmp_path: Path) -> None:
    """Four reading processes and a writing one: nothing lost, no error."""
    datasets.ingest(write_traces(tmp_path / "base.jsonl", 2_000), "base-v1")
    until = time.time() + SECONDS
    reader = (
        "import time\n"
        f"n = 0\nwhile not n or time.time() < {until}:\n"
        "    assert datasets.verify('base-v1').ok\n"
        "    n += len(datasets.sample(datasets.get('base-v1'), 5, seed=n, split=None))\n"
        "print(n)\n"
    )
    writer = (
        "import time\nn = 0\n"
        f"while not n or time.time() < {until}:\n"
        "    datasets.build(f'built-v{n}', Selection(order='random', seed=n, limit=100))\n"
        "    n += 1\nprint(n)\n"
    )
    processes = [start(reader) for _ in range(4)] + [start(writer)]
    done = [process.communicate(timeout=SECONDS + 90) for process in processes]
    assert [p.returncode for p in processes] == [0] * 5, [err.decode()[-500:] for _, err in done]
    counts = [int(out.split()[-1]) for out, _ in done]
    assert all(counts)
    assert len(read.listing(paths.catalog_path())) == 1 + counts[-1]
    for n in range(counts[-1]):
        assert datasets.verify(f"built-v{n}").ok


def test_fuzzed_input_is_one_line(tmp_path: Path) -> None:
    """Lines, filters, keys and settings of any kind: exit 0, 2 or 3, and never a traceback."""
    from click.testing import CliRunner

    from tunix_mlflow.cli import main as command_line
    from tunix_mlflow.runtime import process

    datasets.ingest(write_traces(tmp_path / "base.jsonl", 20), "base-v1")
    digest = datasets.get("base-v1").digest
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET-CONTENT")
    rng = random.Random(7)
    pieces = [
        "a", "topic", "n", "\x00", "'", '"', "$", "[", "]", "{", "}", ":", "=", "!=", ">=", "1e999",
        "NaN", "null", "-1", "\ud800", "../", str(secret), "read_text('/etc/passwd')", "é", "\n",
        "train", "v1", "-", "base-v1", "%", "\\", "x" * 300, "9" * 30, "true", "[[[[", digest,
    ]  # fmt: skip

    def words() -> str:
        return "".join(rng.choices(pieces, k=rng.randint(1, 4)))

    def fuzzed(path: Path) -> str:
        record = rng.choice([{"prompt": "p", "steps": [{"content": "c"}], "answer": "a"}, {}])
        data = json.dumps({**record, words(): words(), "meta": {words(): words()}}).encode()
        cut = rng.randrange(len(data))
        noise = bytes(rng.choices(range(256), k=rng.randint(0, 3)))
        path.write_bytes(rng.choice([data, data[:cut] + noise + data[cut:], data[:cut], noise]))
        return str(path)

    runner = CliRunner()
    for n in range(100 * COUNT):
        kind = rng.randrange(6)
        file = tmp_path / f"fuzz.{rng.choice(['jsonl', 'parquet', 'jsonl.gz', 'txt', 'arrow'])}"
        built = ["--name", f"f{n}", "--version", "v1"]
        arguments = {
            0: ["ingest", fuzzed(file), *built],
            1: ["build", *built, "--where", words(), "--limit", rng.choice(["1", "-1", "10"])],
            2: [rng.choice(["show", "verify", "stats", "sample", "check-leakage"]), words()],
            3: ["ingest", str(tmp_path / "base.jsonl"), "--name", words(), "--version", words()],
            4: ["ingest", fuzzed(file), *built, "--map", words(), "--set", words()],
            5: ["build", *built, "--split", words(), "--where", words(), "--from", words()],
        }[kind]
        code = 0

        def call(argv: list[str]) -> None:
            nonlocal code
            code = process.execute(command_line.invoke, argv)

        with runner.isolation() as streams:
            try:
                call(["datasets", *arguments])
            except SystemExit as stop:
                code = int(stop.code or 0)
            output = b"".join(s.getvalue() for s in streams[:2]).decode("utf-8", "replace")
        assert code in (0, 2, 3), (arguments, output)
        assert "Traceback" not in output, (arguments, output)
        assert "SECRET-CONTENT" not in output
        assert "root:" not in output
    assert datasets.verify("base-v1").ok
    assert snapshot.read(digest)


def test_order_and_threads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One core or two, and reversed: the same digests."""
    path = write_traces(tmp_path / "a.jsonl", 5_000)
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    found = set()
    for cores in ("0", "0,1"):
        for file in (path, backwards):
            home = tmp_path / f"home-{cores}-{file.stem}"
            code = (
                "from tunix_mlflow.data import datasets\n"
                "from tunix_mlflow.data.manifest import Selection\n"
                "from pathlib import Path\n"
                "import os\n"
                f"os.sched_setaffinity(0, {{{cores}}})\n"
                f"a = datasets.ingest(Path({str(file)!r}), 'a-v1').manifest\n"
                "s = Selection(order='random', seed=1, limit=999)\n"
                "b = datasets.build('b-v1', s).manifest\n"
                "print(a.digest, b.digest)\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment({"TUNIX_MLFLOW_HOME": str(home)}),
                capture_output=True,
                text=True,
                check=True,
            )
            found.add(done.stdout.strip())
    assert len(found) == 1
