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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT, environment
from tunix_mlflow.errors import IntegrityError
from tunix_mlflow.models import arrays
from tunix_mlflow.training.checkpoint import Checkpoints, Retention, steps

LONG = int(os.environ.get("TUNIX_FAULTS", "4")) >= 50
DAMAGES = 500 if LONG else 60
CRASHES = 10_000 if LONG else 6
KEEP = Retention(2)


def state(number: int) -> dict[str, jax.Array]:
    """A state that is a function of its number."""
    rng = np.random.default_rng(number)
    return {name: jnp.asarray(rng.normal(size=(40, 30)), jnp.float32) for name in ("a", "b")}


def save_all(folder: Path, numbers: range) -> None:
    kept = Checkpoints(folder, {"dataset_digest": "d"}, retention=KEEP)
    for number in numbers:
        kept.save(number, state(number))
    kept.close()


def newest(folder: Path) -> int:
    """The step that is restored, after it was found to be the state of that number."""
    kept = Checkpoints(folder, {"dataset_digest": "d"}, retention=KEEP)
    found = kept.restore_latest(state(0), lambda _: None)
    kept.close()
    if found is None:
        return 0
    assert arrays.digest(found[1]) == arrays.digest(state(found[0]))
    return found[0]


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    """A flipped bit, a cut and a deletion, in any file of a checkpoint, before it is restored."""
    save_all(tmp_path, range(1, 2))
    (folder,) = steps(tmp_path)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    rng = random.Random(DAMAGES)
    kinds = {"flip": 0, "cut": 0, "deletion": 0}
    for number in range(DAMAGES):
        victim, kind = files[number % len(files)], rng.choice(sorted(kinds))
        good = victim.read_bytes()
        bad = bytearray(good)
        if kind == "flip":
            place = rng.randrange(len(good))
            bad[place] ^= 1 << rng.randrange(8)
            if victim.name == arrays.MANIFEST and bytes(good[place : place + 1]).isspace():
                bad[place] = ord("x")  # white space carries nothing
        elif kind == "cut":
            del bad[rng.randrange(len(good)) :]
        if kind == "deletion":
            victim.unlink()
        else:
            victim.write_bytes(bad)
        with pytest.raises(IntegrityError):
            arrays.check(folder)
        victim.write_bytes(good)
        kinds[kind] += 1
    arrays.check(folder)
    print(
        f"{DAMAGES} of {DAMAGES} damages noticed ({kinds}); silent: below {3 / DAMAGES:.1%} (95 %)"
    )


CRASH = """
import os, sys
from pathlib import Path
from tests.faults.test_checkpoints import save_all, range
folder, at = Path(sys.argv[1]), int(sys.argv[2])
count, armed = 0, False
WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}

def hook(event, arguments):
    global count
    if not armed or event not in WATCHED or not str(arguments[0]).startswith(str(folder)):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return
    count += 1
    if count == at:
        os._exit(9)

sys.addaudithook(hook)
save_all(folder, range(1, 2))
armed = True
save_all(folder, range(2, 5))
armed = False
print(count)
"""


def crash(folder: Path, at: int) -> subprocess.CompletedProcess[str]:
    code = CRASH.replace(", range\n", "\n")
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(at)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_crash_at_any_operation(tmp_path: Path) -> None:
    """Before every rename, removal, mkdir and opening for writing of a save: what is restored is
    whole and the newest that was sealed, and saving goes on from there."""
    done = crash(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    total = int(done.stdout)
    places = list(range(1, total + 1))
    places = places if total <= CRASHES else sorted(random.Random(1).sample(places, CRASHES))
    for at in places:
        folder = tmp_path / f"at-{at}"
        done = crash(folder, at)
        assert done.returncode == 9, done.stderr
        sealed = int(steps(folder)[-1].name)
        assert newest(folder) == sealed >= 1
        save_all(folder, range(sealed + 1, 6))
        assert newest(folder) == 5
        assert [int(p.name) for p in steps(folder)][-2:] == [4, 5] or sealed >= 4
        assert not list(folder.glob(".deleting-*"))
        shutil.rmtree(folder)
    print(f"{len(places)} of {len(places)} crashes survived, of {total} places")


FULL = """
import logging, resource, signal, sys
from pathlib import Path
from tests.faults.test_checkpoints import save_all
from tunix_mlflow.errors import CheckpointError
folder = Path(sys.argv[1])
logging.disable()
save_all(folder, range(1, 2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save_all(folder, range(2, 3))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 200, 3000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond the limit: one line that names the folder and the free space, and
    the last good checkpoint restores."""
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
    assert done.stdout.startswith("cannot write the checkpoint "), done
    assert len(done.stdout.splitlines()) == 1
    assert str(tmp_path / "c") in done.stdout
    assert "MiB are free there" in done.stdout
    assert newest(tmp_path / "c") == 1
