"""Huge pages for the large buffers of a process that trains. Imports no package: it runs twice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_RESTARTED = "_TUNIX_MLFLOW_RESTARTED"  # the process that did
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart(setting: Path = _SETTING) -> None:
    """Restart this process with its large buffers on huge pages, where that is possible.

    XLA allocates its buffers through the C library, and Linux, in its usual setting, gives huge
    pages to a program that asks. glibc (2.35 and later) reads whether to ask
    (`glibc.malloc.hugetlb`) before Python starts. On a CPU a step of a 135M model takes 15 % less
    with them. Does nothing where GLIBC_TUNABLES has that setting, or where Linux does not need to
    be asked.

    Args:
        setting: Linux's file of this setting.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        asks = "[madvise]" in setting.read_text() and os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (OSError, ValueError):  # another system, or another C library
        return
    again = os.environ.get(_RESTARTED) == str(os.getpid())  # exec keeps the number
    if asks and TUNABLE not in tunables and sys.executable and not again:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{TUNABLE}=1".lstrip(":")
        os.environ[_RESTARTED] = str(os.getpid())
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
