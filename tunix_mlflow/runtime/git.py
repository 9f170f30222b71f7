"""The git commit that a run was made from, and whether the work tree had other changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_SECONDS = 5


class Commit(NamedTuple):
    """The commit of a work tree."""

    digest: str
    is_dirty: bool | None  # whether there were other changes; None: git did not say


def commit() -> Commit | None:
    """Return the commit of the work tree of the main script, else of the current folder.

    Files that git does not track do not make a tree dirty, as for `git describe --dirty`.

    Returns:
        None where there is no git or no work tree.
    """
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    folders = [Path.cwd()]
    if script is not None and script.is_file():
        folders.insert(0, script.resolve().parent)
    for folder in folders:
        digest = _git(folder, "rev-parse", "--verify", "HEAD")
        if digest:
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return Commit(digest, None if changes is None else changes != "")
    return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, stripped; None if it fails or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
