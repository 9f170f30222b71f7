"""The import rule: rooms know only the rooms below them, and heavy things load late."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping

import pytest

from tests.conftest import ROOT, environment
from tests.import_graph import PACKAGE, Graph, module_name, read_graph, read_sources
from tests.import_rules import (
    DYNAMIC,
    LEVEL,
    LONGEST,
    OWNED,
    REASON,
    find_foreign,
    find_jax,
    find_large_room,
    find_long,
    find_module_circles,
    find_room_circles,
    find_unresolved,
    find_upward,
    room_of,
    short,
)

SOURCES = read_sources(ROOT)
GRAPH = read_graph(SOURCES)
GRAPH_RULES = (
    *(find_upward, find_foreign, find_unresolved, find_module_circles, find_room_circles),
    find_jax,
)


@pytest.mark.parametrize("rule", GRAPH_RULES, ids=lambda rule: rule.__name__)
def test_imports_point_down(rule: Callable[[Graph], list[str]]) -> None:
    """The tables of the rules hold for every module, and no import leads back."""
    if found := rule(GRAPH):
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("rule", [find_long, find_large_room], ids=lambda rule: rule.__name__)
def test_no_file_and_no_room_is_too_large(
    rule: Callable[[Mapping[str, str]], list[str]],
) -> None:
    """A file has at most 450 lines or says why it has more; a room less than a quarter of all."""
    if found := rule(SOURCES):
        pytest.fail("\n".join(found), pytrace=False)


def test_the_tables_name_what_there_is() -> None:
    """An entry of a table that fits nothing would hold nothing."""
    names = {short(name) for name in GRAPH}
    later = {"integrations"}
    owners = {owner for owners in OWNED.values() for owner in owners} - later
    assert owners <= names
    assert set(LEVEL) - later <= {room_of(name) for name in names}
    assert {name for name in DYNAMIC if not any(i.problem for i in GRAPH[name].imports)} == set()


def test_every_public_name_is_resolved() -> None:
    """`from tunix_mlflow import x` counts as an import of the module that defines x."""
    root = ast.parse(GRAPH[PACKAGE].source)
    tables = [
        ast.literal_eval(node.value)
        for node in root.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    names = [name for table in tables for name in table if not name.startswith("__")]
    assert names
    uses = "".join(f"from tunix_mlflow import {name}\n" for name in names)
    graph = read_graph({**SOURCES, "tunix_mlflow/cli/planted.py": uses})
    assert find_unresolved(graph) == find_unresolved(GRAPH)
    assert all(one.name.count(".") > 1 for one in graph["tunix_mlflow.cli.planted"].imports)


# A small house, in which nothing is wrong.
SMALL = {
    "tunix_mlflow/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from tunix_mlflow.config.schema import Config\n"
        "    from tunix_mlflow.pipelines.train import train\n"
        "_MODULES = {'Run': 'tunix_mlflow.tracking.run', 'Config': 'tunix_mlflow.config.schema'}\n"
    ),
    "tunix_mlflow/errors.py": "class InputError(Exception): ...",
    "tunix_mlflow/paths.py": "from tunix_mlflow.errors import InputError",
    "tunix_mlflow/config/schema.py": "class Config: ...",
    "tunix_mlflow/runtime/devices.py": "import jax",
    "tunix_mlflow/runtime/process.py": "def fail():\n    import mlflow",
    "tunix_mlflow/data/__init__.py": "",
    "tunix_mlflow/data/seeds.py": "from tunix_mlflow import Config, __version__, paths",
    "tunix_mlflow/models/decoder.py": "from ..runtime import devices\nimport flax.nnx",
    "tunix_mlflow/training/loop.py": "from tunix_mlflow.models import decoder",
    "tunix_mlflow/tracking/run.py": "import mlflow\nimport tunix_mlflow.training.loop",
    "tunix_mlflow/tracking/plugins/context.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import jax\n"
        "def active():\n    from tunix_mlflow.training import loop"
    ),
    "tunix_mlflow/pipelines/train.py": "from tunix_mlflow import Run",
    "tunix_mlflow/cli/main.py": "import click\ndef f():\n    from tunix_mlflow import train",
    "projects/train.py": "from tunix_mlflow.cli.main import run_command",
    "seeds/golden_v1.py": "from tunix_mlflow.data.seeds import seed",
}
DATA, MODELS = "tunix_mlflow/data/planted.py", "tunix_mlflow/models/planted.py"
TYPES = "from typing import TYPE_CHECKING\n"


@pytest.mark.parametrize("rule", GRAPH_RULES, ids=lambda rule: rule.__name__)
def test_the_rules_can_be_kept(rule: Callable[[Graph], list[str]]) -> None:
    """What the rules allow is allowed: lazily, for types, by public and by relative names."""
    assert rule(read_graph(SMALL)) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (find_upward, DATA, "from tunix_mlflow.tracking import run"),
        (find_upward, DATA, "import tunix_mlflow.training.loop as loop"),
        (find_upward, DATA, "from ..tracking.run import Run"),
        (find_upward, DATA, "from .. import tracking"),
        (find_upward, "tunix_mlflow/data/__init__.py", "from ..tracking import run"),
        (find_upward, "tunix_mlflow/errors.py", "from .config import schema"),
        (find_upward, MODELS, "def f():\n    from tunix_mlflow.training import loop"),
        (find_upward, MODELS, "f = lambda: __import__('tunix_mlflow.training.loop')"),
        (find_upward, MODELS, "class C:\n    def f(self):\n        from ..training import loop"),
        (find_upward, MODELS, "import importlib\nimportlib.import_module('tunix_mlflow.cli.main')"),
        (
            find_upward,
            MODELS,
            "from importlib import import_module as load\nload(name='tunix_mlflow.cli')",
        ),
        (
            find_upward,
            MODELS,
            "import importlib as i\ni.import_module('..training.loop', __package__)",
        ),
        (
            find_upward,
            MODELS,
            "import pkgutil\npkgutil.resolve_name('tunix_mlflow.training.loop:fit')",
        ),
        (find_upward, MODELS, "from tunix_mlflow import train"),
        (find_upward, MODELS, "from .. import Run"),
        (find_upward, MODELS, "import tunix_mlflow\ntunix_mlflow.train()"),
        (find_upward, MODELS, "import tunix_mlflow as t\ndef f():\n    t.Run"),
        (find_upward, MODELS, f"{TYPES}if TYPE_CHECKING:\n    from ..tracking.run import Run"),
        (
            find_upward,
            MODELS,
            "import typing\nif typing.TYPE_CHECKING:\n    from tunix_mlflow import Run",
        ),
        (find_upward, MODELS, "try:\n    import tunix_mlflow.cli.main\nexcept ImportError: ..."),
        (find_upward, MODELS, "from tunix_mlflow.attic import x"),
        (find_upward, "tunix_mlflow/cli/planted.py", "import projects.train"),
        (find_upward, "tunix_mlflow/data/planted.py", "from seeds import golden_v1"),
        (find_upward, "projects/planted.py", "from projects import train"),
        (find_upward, "projects/planted.py", "from tunix_mlflow.pipelines.train import train"),
        (find_upward, "projects/planted.py", "from tunix_mlflow import train"),
        (find_upward, "seeds/planted.py", "from tunix_mlflow import paths"),
        (find_foreign, DATA, "import duckdb"),
        (find_foreign, DATA, "import jax.numpy"),
        (find_foreign, DATA, "def f():\n    from jax import numpy"),
        (find_foreign, DATA, f"{TYPES}if TYPE_CHECKING:\n    import jax\nelse:\n    import jax"),
        (find_foreign, DATA, f"{TYPES}if not TYPE_CHECKING:\n    import jax"),
        (find_foreign, DATA, f"{TYPES}if TYPE_CHECKING or True:\n    import jax"),
        (find_foreign, "tunix_mlflow/runtime/planted.py", "import jax"),
        (find_foreign, "tunix_mlflow/runtime/process.py", "import mlflow"),
        (find_foreign, "tunix_mlflow/training/planted.py", "def f():\n    import mlflow"),
        (find_foreign, "tunix_mlflow/tracking/planted.py", "import click"),
        (find_foreign, "tunix_mlflow/cli/planted.py", "def f():\n    __import__('jax')"),
        (find_foreign, "seeds/planted.py", "import jax"),
        (find_foreign, "projects/planted.py", "import click"),
        (find_unresolved, DATA, "import importlib\nimportlib.import_module(f'tunix_mlflow.{x}')"),
        (find_unresolved, DATA, "import importlib\nimportlib.import_module('tunix_mlflow.' + x)"),
        (find_unresolved, DATA, "def f(name):\n    __import__(name)"),
        (find_unresolved, DATA, "from tunix_mlflow import *"),
        (find_unresolved, DATA, "from tunix_mlflow import nothing"),
        (
            find_unresolved,
            DATA,
            "from importlib import util\nutil.spec_from_file_location('x', 'x.py')",
        ),
        (find_unresolved, DATA, "import runpy\nrunpy.run_path('projects/train.py')"),
        (
            find_jax,
            DATA,
            "def f():\n    from tunix_mlflow.runtime import devices",
        ),
        (find_jax, "tunix_mlflow/cli/planted.py", "from tunix_mlflow.training import loop"),
        (
            find_jax,
            "tunix_mlflow/tracking/plugins/planted.py",
            "from tunix_mlflow.tracking import run",
        ),
        (find_jax, "tunix_mlflow/data/__init__.py", "from tunix_mlflow.runtime import devices"),
    ],
)
def test_each_rule_can_be_broken(
    rule: Callable[[Graph], list[str]], path: str, source: str
) -> None:
    """One module planted in the small house is found, and named with its file."""
    found = rule(read_graph({**SMALL, path: source}))
    assert any(path in line or module_name(path) in line for line in found)


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (
            find_module_circles,
            {"data/a.py": "from tunix_mlflow.data import b", "data/b.py": "from . import a"},
        ),
        (
            find_module_circles,
            {"data/a.py": "from .b import x", "data/b.py": "def f():\n    from .a import y"},
        ),
        (
            find_module_circles,
            {
                "data/a.py": "from . import b",
                "data/b.py": "from . import c",
                "data/c.py": "import tunix_mlflow.data.a",
            },
        ),
        (
            find_room_circles,
            {
                "benchmarks/a.py": "from ..integrations import b",
                "integrations/b.py": "",
                "integrations/c.py": "def f():\n    from tunix_mlflow.benchmarks import d",
                "benchmarks/d.py": "",
            },
        ),
        (
            find_room_circles,
            {
                "data/a.py": "def f():\n    from tunix_mlflow import Run",
                "tracking/run.py": "from ..data import seeds",
            },
        ),
    ],
)
def test_a_circle_is_found(rule: Callable[[Graph], list[str]], planted: dict[str, str]) -> None:
    """Of two modules, of three, through a lazy import, and of two rooms without one of modules."""
    small = SMALL | {f"tunix_mlflow/{path}": source for path, source in planted.items()}
    assert rule(read_graph(small))


def test_a_circle_for_types_alone_is_none() -> None:
    """What never runs leads nowhere."""
    typed = f"{TYPES}if TYPE_CHECKING:\n    from tunix_mlflow.data import b"
    planted = {DATA: typed, "tunix_mlflow/data/b.py": "from tunix_mlflow.data import planted"}
    assert find_module_circles(read_graph(SMALL | planted)) == []


def test_a_long_file_is_found() -> None:
    """450 lines are allowed, 451 with a reason; a room of a quarter is one too many."""
    lines = "x = 1\n" * LONGEST
    assert find_long({DATA: lines}) == []
    assert find_long({DATA: f"{lines}x = 1\n"})
    assert find_long({DATA: f"# It is {REASON} it is one table.\n{lines}"}) == []
    rooms = {f"tunix_mlflow/{room}/a.py": lines for room in "abcde"}
    assert find_large_room(rooms) == []
    assert find_large_room({**rooms, "tunix_mlflow/a/b.py": lines})


HEAVY = ("jax", "flax", "orbax", "optax", "duckdb", "pyarrow")


def plugin_modules() -> list[str]:
    """The modules that MLflow loads, from the entry points of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["entry-points"].items()
    values = [v for name, group in groups if name.startswith("mlflow.") for v in group.values()]
    return sorted({str(value).partition(":")[0] for value in values})


LIGHT = {
    "import tunix_mlflow": ("mlflow", "numpy", *HEAVY),
    "import tunix_mlflow.cli.main": ("mlflow", "numpy", *HEAVY),
    "import tunix_mlflow.runtime.process": ("mlflow", "numpy", *HEAVY),
    "import tunix_mlflow.runtime.environment": ("mlflow", "numpy", *HEAVY),
    # A user's run, which may have nothing to do with jax, and `seed`.
    "import tunix_mlflow.tracking.run, tunix_mlflow.pipelines.seed": ("jax", "flax", "orbax"),
    # MLflow itself loads numpy and pyarrow.
    f"import mlflow, {', '.join(plugin_modules())}": HEAVY[:-1],
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


@pytest.mark.parametrize("statement", LIGHT)
def test_what_must_load_quickly_does(statement: str) -> None:
    """Every `import mlflow` loads our plugins, and --help should not wait for jax."""
    assert loaded(statement, LIGHT[statement]) == set()


def test_loading_would_be_noticed() -> None:
    """The test above can fail."""
    assert loaded("import tunix_mlflow.models.decoder", HEAVY) >= {"jax", "flax"}


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
