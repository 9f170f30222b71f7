"""README, help and files tell the truth, as far as a test can see it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.conftest import ROOT
from tests.test_cli import commands
from tunix_mlflow.cli.main import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> list[Path]:
    """Files that are, or would be, committed."""
    words = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split() if (ROOT / name).is_file()]


def tree() -> dict[str, str]:
    """Path -> phrase, from the README's file tree."""
    block = README.split("## The tree")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"    (( {2})*)(\S+)\s{2,}(\S.*)", line)
        if match:
            depth = len(match[1]) // 2
            del folders[depth:]
            found["".join(folders) + match[3]] = match[4]
            if match[3].endswith("/"):
                folders.append(match[3])
    return found


def test_the_tree_is_the_tree() -> None:
    """Every path in the README exists, and every module stands in it with a phrase."""
    shown = tree()
    assert all((ROOT / path).exists() for path in shown)
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("tunix_mlflow", "projects", "seeds")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules <= set(shown)
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    top = {name for name in top if not name.startswith(".") and name.count(".md") == 0}
    assert top - {"LICENSE"} == {path.rstrip("/") for path in shown if "/" not in path.rstrip("/")}


@pytest.mark.parametrize("name", commands(cli, "tunix-mlflow"))
def test_every_command_has_help_and_a_line_in_the_readme(name: str) -> None:
    """And the help starts with a sentence."""
    result = CliRunner().invoke(cli, [*name.split()[1:], "--help"])
    assert result.exit_code == 0
    assert re.search(r"\n {2}[A-Z].+", result.output)
    assert f"| `{name}` |" in README


def test_the_readme_names_no_command_that_is_not_there() -> None:
    """Every `tunix-mlflow X` in the documents and messages is a command."""
    known = commands(cli, "tunix-mlflow")
    first_words = {name.split()[1] for name in known}
    sources = [path for path in tracked() if path.suffix in (".md", ".py", ".yaml", ".yml")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for word in re.findall(r"(?:`|^ +)tunix-mlflow ([a-z]+)\b", text, re.MULTILINE):
            assert word in first_words, (path, word)


def test_every_entry_point_and_preset_is_in_the_readme() -> None:
    """So are the declared parameters' values."""
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    for name in set(entries) - {"main"}:
        assert f"-e {name} " in README
    for preset in (ROOT / "projects" / "configs").glob("*.yaml"):
        assert f"`{preset.stem}`" in README


def test_every_environment_variable_is_in_the_readme() -> None:
    """What the code reads or sets, a user can look up."""
    files = ("runtime/process.py", "runtime/environment.py", "runtime/huge_pages.py", "paths.py")
    text = "".join((ROOT / "tunix_mlflow" / name).read_text() for name in files)
    names = set(re.findall(r'"((?:MLFLOW|TUNIX|JAX|XLA|NPROC|GLIBC)[A-Z_]*)"', text))
    internal = {
        "JAX_PLATFORMS",
        "MLFLOW_RUN_ID",
        "MLFLOW_LOGGING_LEVEL",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR",
    }
    assert names - internal
    assert all(name in README for name in names - internal)


def test_no_file_names_an_index_or_a_machine() -> None:
    """The lock carries hashes and no addresses; no path of a developer's machine is committed."""
    for path in tracked():
        if path.suffix in (".png", ".npz", ".gz"):
            continue
        text = path.read_text(encoding="utf-8")
        index = "py" + "pi"
        assert index not in text.lower(), path
        assert not re.search(r"https?://[\w.-]+/(simple|packages)\b", text), path
        assert not re.search(r"(?<![\w.])/(root|work|home/\w+)/", text), path
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock
    assert "http" not in lock.replace("aiohttp", "").replace("httpx", "").replace("httpcore", "")


def test_contributing_names_real_targets() -> None:
    """Every `make X` in the documents is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        words = re.findall(r"(?:`|^ {4})make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(words) <= targets, name
