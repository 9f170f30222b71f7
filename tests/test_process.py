"""The process of a command: how it begins, and the exit codes by which it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunix_mlflow.errors import (
    ConfigError,
    IntegrityError,
    Interrupted,
    TrainingStopped,
    UnavailableError,
)
from tunix_mlflow.runtime import process

ASKED = "always [madvise] never"
SCRIPT = """
import json, os, sys
from pathlib import Path
from tunix_mlflow.runtime import huge_pages
huge_pages.restart(Path(sys.argv[1]))
print(json.dumps([os.getpid(), sys.argv[2:], os.environ.get("GLIBC_TUNABLES")]))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="a setting of glibc")
@pytest.mark.parametrize(
    ("setting", "given", "expected"),
    [
        (ASKED, None, "glibc.malloc.hugetlb=1"),
        (ASKED, "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        (ASKED, "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        (None, None, None),
    ],
)
def test_large_buffers_ask_for_huge_pages(
    setting: str | None, given: str | None, expected: str | None, tmp_path: Path
) -> None:
    """The same process with the same arguments, where Linux has to be asked and nobody did."""
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    arguments = ["two words", "", "--last"]
    child = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "enabled", *arguments],
        stdout=subprocess.PIPE,
        env=env if given is None else env | {"GLIBC_TUNABLES": given},
    )
    assert json.loads(child.communicate()[0]) == [child.pid, arguments, expected]
    assert child.returncode == 0


ENDS = """
import threading
import time
from tunix_mlflow.errors import ConfigError
from tunix_mlflow.runtime import process

def main(_):
    import jax

    def deep(x):
        for n in range(3000):
            x = jax.numpy.sin(x) * n
        return x

    lowered = jax.jit(deep).lower(1.0)
    threading.Thread(target=lowered.compile, name=process.COMPILING).start()
    time.sleep(0.5)
    assert any(t.name == process.COMPILING for t in threading.enumerate())
    raise ConfigError("a mistake")

process.run(main, [], compute=False)
"""


def test_a_mistake_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    """One line and exit code 2, while XLA is at work in its thread."""
    (tmp_path / "script.py").write_text(ENDS)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "tunix-mlflow: error: a mistake\n")


def failed_request() -> Exception:
    import requests

    return requests.ConnectionError("no route")


FULL_DISK = """
import errno, os, sys
from pathlib import Path
import jax.numpy as jnp
from tunix_mlflow.models import arrays
from tunix_mlflow.runtime import process

make = os.mkdir
def refuse(path, *rest):
    if "array_metadatas" in str(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    make(path, *rest)
os.mkdir = refuse
tree = {str(n): jnp.ones((300, 300)) for n in range(200)}
sys.exit(process.execute(lambda words: arrays.write(Path(words[0], "x"), tree), sys.argv[1:]))
"""


def test_a_disk_that_is_full_amid_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    """TensorStore's threads write on after Orbax has failed, and fail too."""
    (tmp_path / "script.py").write_text(FULL_DISK)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert "No space left on device" in done.stderr


def refused_request(code: str) -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    return MlflowException("said so", error_code=databricks_pb2.ErrorCode.Value(code))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a\nb"), 2, "a b"),
        (IntegrityError("x"), 3, "x"),
        (UnavailableError("x"), 4, "x"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/f"),
            4,
            "No space left on device at /f",
        ),
        (MemoryError("x"), 4, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 4, "out of memory"),
        (failed_request(), 4, "MLflow cannot be reached: no route"),
        (refused_request("INTERNAL_ERROR"), 4, "MLflow failed: said so"),
        (refused_request("RESOURCE_DOES_NOT_EXIST"), 4, "MLflow failed: said so"),
        (TrainingStopped("x"), 1, "x"),
        (Interrupted(15), 143, "interrupted by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT"),
        (ConfigError("key '\x1b[2J'"), 2, r"key '\x1b[2J'"),
    ],
    ids=repr,
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line on stderr, without control characters, and the code that its cause has."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards

    def main(_: object) -> None:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert process.execute(main, []) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tunix-mlflow: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_defect_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and what a report of it needs."""

    def main(_: object) -> None:
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert process.execute(main, []) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Traceback" in capsys.readouterr().err
