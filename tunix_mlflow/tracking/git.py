"""The git commit that a run was made from, and whether the work tree had other changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tunix_mlflow.tracking import tags

_SECONDS = 5


def commit_tags() -> dict[str, str]:
    """Return commit and dirty flag of the work tree of the main script, else of the current folder.

    Files that git does not track do not make a tree dirty, as for `git describe --dirty`.

    Returns:
        The tags; empty where there is no git or no work tree.
    """
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    folders = [Path.cwd()]
    if script is not None and script.is_file():
        folders.insert(0, script.resolve().parent)
    for folder in folders:
        commit = _git(folder, "rev-parse", "--verify", "HEAD")
        if commit:
            found = {tags.GIT_COMMIT: commit}
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
            if changes is not None:
                found[tags.GIT_DIRTY] = "true" if changes else "false"
            return found
    return {}


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
