"""The import rule: rooms know only the rooms below them, and heavy things load late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

# Each room, lowest first; a room imports itself and what stands in an earlier line.
ROOMS = (
    ("errors", "files", "paths"),
    ("config",),
    ("runtime",),
    ("data",),
    ("text",),
    ("input",),
    ("models",),
    ("evaluation",),
    ("training",),
    ("tracking",),
    ("pipelines",),
    ("benchmarks", "integrations"),
    ("cli",),
    ("projects",),
)
# evaluation is pure: it stands above models but uses data alone.
CATALOG = ("connection", "diff", "digests", "migrations", "read", "splits", "store", "verify")
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# Packages that only these rooms may name.
OWNED = {
    "mlflow": {"tracking", "pipelines", "benchmarks", "integrations", "projects"},
    "click": {"cli"},
    "tqdm": {"cli", "projects"},
    "duckdb": {f"data.catalog.{name}" for name in CATALOG},
    "jax": {"runtime.devices", "models", "training", "pipelines", "benchmarks", "integrations"},
    "flax": {"models", "training", "benchmarks", "integrations"},
    "optax": {"training", "benchmarks", "integrations"},
    "orbax": {"models", "training"},
    "safetensors": {"models", "benchmarks"},
    "tokenizers": {"text.hub_tokenizer", "models.hub.gguf_file", "benchmarks"},
    "jinja2": {"text.chat_template"},
    "gguf": {"models.hub.gguf_file"},
}
# In these, not even inside a function, except in the last resort of runtime/process.py.
EXCEPTIONS = {("runtime", "mlflow")}


def room_of(path: Path) -> tuple[str, str]:
    """tunix_mlflow/data/catalog/read.py -> ("data", "data.catalog.read")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "tunix_mlflow":
        return parts[0], ".".join(parts)
    if parts[1] == "__init__":
        return "package", "package"
    return parts[1], ".".join(parts[1:])


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all imports, inside functions too, without those for types alone."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violations(room: str, module: str, source: str) -> list[str]:
    """What of a module's imports breaks the rule."""
    found = []
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top in ("tunix_mlflow", "projects", "seeds"):
            target = rest.partition(".")[0] if top == "tunix_mlflow" else top
            if target in LEVEL and LEVEL[target] > LEVEL[room]:
                found.append(f"{module} imports {name}, which stands above it")
            if target in ("projects", "seeds") and target != room:
                found.append(f"{module} imports {name}; nothing does")
        allowed = OWNED.get(top)
        if allowed is not None and not {room, module} & allowed and (room, top) not in EXCEPTIONS:
            found.append(f"{module} imports {name}, which is not its business")
    return found


FILES = sorted([*(ROOT / "tunix_mlflow").rglob("*.py"), *(ROOT / "projects").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    """The table above holds for every file."""
    room, module = room_of(path)
    if room != "package":
        assert violations(room, module, path.read_text()) == []


def test_seeds_import_data_alone() -> None:
    """A seed is a generator of traces and nothing else."""
    for path in (ROOT / "seeds").glob("*.py"):
        ours = [n for n in imported(ast.parse(path.read_text())) if n.startswith("tunix_mlflow")]
        assert all(name.startswith("tunix_mlflow.data.") for name in ours)


@pytest.mark.parametrize(
    ("room", "module", "source"),
    [
        ("data", "data.x", "from tunix_mlflow.tracking import session"),
        ("training", "training.x", "def f():\n    import mlflow"),
        ("models", "models.x", "import tunix_mlflow.training.loop"),
        ("data", "data.x", "import duckdb"),
        ("data", "data.x", "import jax.numpy"),
        ("tracking", "tracking.x", "from tunix_mlflow.cli import main"),
        ("cli", "cli.x", "import projects.train"),
        ("tracking", "tracking.x", "import click"),
        ("errors", "errors", "from tunix_mlflow import config"),
    ],
)
def test_the_rule_can_be_broken(room: str, module: str, source: str) -> None:
    """The test above would notice."""
    assert violations(room, module, source)


HEAVY = ("jax", "flax", "orbax", "duckdb", "optax", "pyarrow")
LIGHT = {
    "tunix_mlflow": ("mlflow", "numpy", *HEAVY),
    "tunix_mlflow.cli.main": ("mlflow", "numpy", *HEAVY),
    "tunix_mlflow.runtime.process": ("mlflow", "numpy", *HEAVY),
    "tunix_mlflow.tracking.plugins.context": HEAVY[:5],
    "tunix_mlflow.tracking.plugins.dataset_source": HEAVY[:5],
    "mlflow": HEAVY[:5],
}


def loaded(statement: str, names: tuple[str, ...]) -> set[str]:
    """Which of the packages are loaded after a statement in a new process."""
    code = f"import sys\n{statement}\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        cwd=ROOT,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_load_quickly_does(module: str) -> None:
    """Every `import mlflow` loads our plugins, and --help should not wait for jax."""
    assert loaded(f"import {module}", LIGHT[module]) == set()


def test_loading_would_be_noticed() -> None:
    """The test above can fail."""
    assert loaded("import tunix_mlflow.data.catalog.store", HEAVY) >= {"duckdb"}


def test_help_loads_neither_jax_nor_mlflow() -> None:
    """The whole command, with its last word: what is loaded when it has printed."""
    code = (
        "import contextlib, io\n"
        "from tunix_mlflow.cli.main import cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    cli(['--help'])\n"
        "assert 'Usage' in out.getvalue()"
    )
    assert loaded(code, ("mlflow", *HEAVY)) == set()
