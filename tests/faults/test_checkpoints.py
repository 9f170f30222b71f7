"""Checkpoints under damage: every flip is noticed, and no crash of a save costs the one before.

Quick by default; with TUNIX_FAULTS=50 or more, 500 damages and a crash at every operation.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT, environment
from tunix_mlflow.errors import CheckpointError, IntegrityError, UnavailableError
from tunix_mlflow.models import arrays
from tunix_mlflow.training.checkpoint import QUARANTINE, Checkpoints, Retention, sealed_checkpoints

LONG = int(os.environ.get("TUNIX_FAULTS", "4")) >= 50
DAMAGES = 500 if LONG else 60
CRASHES = 10_000 if LONG else 8
KEEP = Retention(2)


def state(number: int) -> dict[str, jax.Array]:
    """A state that is a function of its number."""
    rng = np.random.default_rng(number)
    return {name: jnp.asarray(rng.normal(size=(40, 30)), jnp.float32) for name in ("a", "b")}


def manager(folder: Path, on_sealed: Callable[[Path, int], None] | None = None) -> Checkpoints:
    return Checkpoints(folder, {"dataset_digest": "d"}, retention=KEEP, on_sealed=on_sealed)


def save_all(
    folder: Path, numbers: range, on_sealed: Callable[[Path, int], None] | None = None
) -> None:
    kept = manager(folder, on_sealed)
    try:
        for number in numbers:
            kept.save(number, state(number), {"validation/loss": 1 / number})
    finally:
        kept.close()


def newest(folder: Path) -> int:
    """The step that is restored, after it was found to be the state of that number; 0: none.

    Nothing torn was ever taken for a checkpoint, so nothing is put into quarantine.
    """
    reports: list[str] = []
    kept = manager(folder)
    found = kept.restore_latest(state(0), reports.append)
    kept.close()
    assert reports == []
    if found is None:
        return 0
    assert arrays.digest(found[1]) == arrays.digest(state(found[0]))
    return found[0]


def bound(count: int) -> str:
    """What no failure in so many attempts says."""
    return f"failing: below {3 / count:.1%} (95 %)"


def test_every_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit, a cut and a deletion, in any file of a checkpoint, before Orbax reads it."""

    def never(*_: object) -> NoReturn:
        raise AssertionError("a damaged checkpoint was read")

    save_all(tmp_path, range(1, 2))
    (folder,) = sealed_checkpoints(tmp_path)
    kept = manager(tmp_path)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert len(files) > 5
    rng = random.Random(DAMAGES)
    kinds = {"flip": 0, "cut": 0, "deletion": 0}
    read = arrays.read
    monkeypatch.setattr(arrays, "read", never)
    for number in range(DAMAGES):
        victim = files[number % len(files)]
        good = victim.read_bytes()
        kind = rng.choice(sorted(kinds)) if good else "deletion"
        bad = bytearray(good)
        if kind == "flip":
            bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del bad[rng.randrange(len(good)) :]
        if kind == "deletion":
            victim.unlink()
        else:
            victim.write_bytes(bad)
        # Without its manifest it is no checkpoint.
        no_manifest = kind == "deletion" and victim.name == arrays.MANIFEST
        with pytest.raises(CheckpointError if no_manifest else IntegrityError):
            kept.restore(1, state(0))
        victim.write_bytes(good)
        kinds[kind] += 1
    monkeypatch.setattr(arrays, "read", read)
    assert arrays.digest(kept.restore(1, state(0))) == arrays.digest(state(1))
    kept.close()
    print(f"{DAMAGES} of {DAMAGES} damages noticed ({kinds}); {bound(DAMAGES)}")


_WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def _arm(folder: Path, crash_at: int) -> list[int]:
    """Count operations below a folder, and die before one of them: every rename, removal, mkdir,
    opening for writing, and every write, flush, fsync and close of a file that Python wrote."""
    count = [0]

    def tick() -> None:
        count[0] += 1
        if count[0] == crash_at:
            os._exit(9)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED:
            return
        # shutil.rmtree names an entry and its open folder, not a path.
        within = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not within and not str(arguments[0]).startswith(f"{folder}/"):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        tick()

    def ticking(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            tick()
            return real(*arguments)

        return counted

    real_open = Path.open

    def opened(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        file: Any = real_open(self, mode, *more, **options)
        if "w" in mode:
            for name in ("write", "flush", "close"):
                setattr(file, name, ticking(getattr(file, name)))
        return file

    Path.open = opened  # type: ignore[method-assign]
    os.fsync = ticking(os.fsync)
    sys.addaudithook(hook)
    return count


def crashing(folder: Path, places: list[int]) -> None:
    """For each place, a child saves four checkpoints and dies there; its exit code on stdout, and
    in at-N.sealed the steps that it was told are safe. Place 0: the number of places instead."""
    for at in places:
        pid = os.fork()
        if pid == 0:
            count = _arm(folder / f"at-{at}", at)
            save_and_tell(folder / f"at-{at}", folder / f"at-{at}.sealed")
            if at == 0:
                print(count[0], flush=True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if at:
            print(code, flush=True)


def save_and_tell(folder: Path, told: Path) -> None:
    log = os.open(told, os.O_WRONLY | os.O_CREAT)

    def sealed(_: Path, step: int) -> None:
        os.write(log, f"{step}\n".encode())

    save_all(folder, range(1, 5), sealed)


def crash(folder: Path, places: list[int]) -> list[int]:
    """What :func:`crashing` prints, run where nothing of jax was initialised."""
    code = (
        "import sys, pathlib; from tests.faults.test_checkpoints import crashing;"
        "crashing(pathlib.Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *map(str, places)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_crash_at_any_operation(tmp_path: Path) -> None:
    """Before every operation of four saves: what is restored is complete and the newest that was
    called sealed, the one before it is there too, and saving continues from there."""
    (total,) = crash(tmp_path, [0])
    assert total > 40
    places = list(range(1, total + 1))
    places = places if total <= CRASHES else sorted(random.Random(1).sample(places, CRASHES))
    codes = crash(tmp_path, places)
    assert len(codes) == len(places)
    assert set(codes) <= {9, 0}  # 0: Orbax's threads needed an operation less
    assert codes.count(9) >= 0.9 * len(codes)
    for at in places:
        folder = tmp_path / f"at-{at}"
        told = [int(n) for n in (tmp_path / f"at-{at}.sealed").read_text().split()]
        complete = [int(p.name) for p in sealed_checkpoints(folder) if arrays.check(p)]
        assert set(told[-2:]) <= set(complete)
        last = newest(folder)
        assert last == max(complete, default=0) >= max(told, default=0)
        save_all(folder, range(last + 1, last + 3))
        assert newest(folder) == last + 2
        left = {p.name for p in folder.iterdir()}
        assert left == {f"{last + 1:08d}", f"{last + 2:08d}"}
        shutil.rmtree(folder)
    died = codes.count(9)
    print(f"{died} of {died} crashes survived, of {total} places; {bound(died)}")


FULL = """
import logging, resource, signal, sys
from pathlib import Path
from tests.faults.test_checkpoints import newest, save_all, manager, state
from tunix_mlflow.errors import UnavailableError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
logging.disable()
save_all(folder, range(1, 2))
kept = manager(folder)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    kept.save(2, state(2))
    kept.wait()
except UnavailableError as error:
    print(error)
print(newest(folder))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
kept.save(2, state(2))
kept.close()
print(newest(folder))
"""


@pytest.mark.parametrize("limit", [0, 200, 3000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond the limit: one line that names the folder, the cause and the free
    space, the last good checkpoint restores, and when there is room again the same manager saves
    the same step."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "c"), str(limit)],
        cwd=ROOT,
        env=environment({"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != -signal.SIGXFSZ
    said, *restored = done.stdout.splitlines()
    assert said.startswith(f"cannot write the checkpoint {tmp_path / 'c' / '00000002'}: File too")
    assert said.endswith("MiB are free there")
    assert restored == ["1", "2"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """Of the step, or of the quarantine: a line that names path and free space, and the last good
    checkpoint restores."""
    save_all(tmp_path, range(1, 3))
    (tmp_path / "00000003").write_text("x")
    with pytest.raises(UnavailableError, match=r"write .*00000003: File exists; \d+ MiB are free"):
        save_all(tmp_path, range(3, 4))
    assert newest(tmp_path) == 2
    victim = tmp_path / "00000002" / arrays.MANIFEST
    good = victim.read_bytes()
    victim.write_bytes(good[1:])
    (tmp_path / QUARANTINE).write_text("x")
    with pytest.raises(UnavailableError, match=r"move to quarantine/ .*00000002: .* MiB are free"):
        newest(tmp_path)
    victim.write_bytes(good)
    assert newest(tmp_path) == 2
