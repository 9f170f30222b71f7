"""docs/architecture.md tells where every value of a training comes from, and the code agrees."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.import_rules import LEVEL, OWNED, ROOMS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"\| (\d+) \| ([^|]+) \| `([\w.]+):([\w.]+)` \| `([\w./]+)` \|")


class Hop(NamedTuple):
    number: int
    value: str
    module: str  # below tunix_mlflow
    function: str
    path: str


def read_tables(page: str) -> list[list[Hop]]:
    """The hops of each table whose rows begin with a number."""
    tables: list[list[Hop]] = []
    for line in page.splitlines():
        if match := ROW.fullmatch(line):
            number, *rest = match.groups()
            if number == "1":
                tables.append([])
            tables[-1].append(Hop(int(number), *rest))
    return tables


def functions_in(source: str) -> set[str]:
    """f, and C.f of a class C, of a module's source."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return names


def find_wrong(hops: Sequence[Hop], root: Path = ROOT) -> list[str]:
    """What a table says that the code does not."""
    found = []
    level = 0
    for expected, hop in enumerate(hops, start=1):
        if hop.number != expected:
            found.append(f"hop {hop.number} comes after hop {expected - 1}")
        if hop.path != f"tunix_mlflow/{hop.module.replace('.', '/')}.py":
            found.append(f"hop {hop.number}: {hop.module} is not {hop.path}")
        elif not (root / hop.path).is_file():
            found.append(f"hop {hop.number}: there is no {hop.path}")
        elif hop.function not in functions_in((root / hop.path).read_text(encoding="utf-8")):
            found.append(f"hop {hop.number}: {hop.path} has no function {hop.function}")
        here = LEVEL[hop.module.partition(".")[0]]
        if here < level:
            found.append(f"hop {hop.number} goes back to {hop.module}")
        level = max(level, here)
    return found


TABLES = read_tables(PAGE)


@pytest.mark.parametrize("hops", TABLES, ids=lambda hops: hops[0].function)
def test_the_hops_are_in_the_code(hops: list[Hop]) -> None:
    """Each names a function of its file, and none goes back to a lower room."""
    if found := find_wrong(hops):
        pytest.fail("\n".join(found), pytrace=False)


def test_the_trace_is_followed_from_a_line_to_a_registered_version() -> None:
    """The table of a training trace begins in a file, and goes through every room on the way."""
    trace = TABLES[0]
    assert (trace[0].module, trace[0].function) == ("data.rows", "lines")
    assert {"registry", "gate"} <= {hop.module.rpartition(".")[2] for hop in trace}
    rooms = [hop.module.partition(".")[0] for hop in trace]
    way = ("data", "text", "input", "models", "training", "tracking", "pipelines")
    assert tuple(dict.fromkeys(rooms)) == way
    # Every row of the page that has a number was read.
    assert sum(map(len, TABLES)) == len(re.findall(r"^\| \d", PAGE, re.MULTILINE))


def test_every_room_is_on_the_page_in_order() -> None:
    """As `import_rules` has them, with what only some of them may import."""
    block = PAGE.split("## The rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| ([^|]+) \|$", block, re.MULTILINE)
    listed = [name for row, _ in rows for name in re.findall(r"`([a-z]+)/?`", row)]
    rooms = [room for rooms in ROOMS for room in rooms if room not in ("version", "integrations")]
    assert listed == [*rooms, "seeds"]
    for package in ("mlflow", "duckdb", "click"):
        for name, imports in rows:
            room = re.findall(r"`([a-z]+)/?`", name)[0]
            owns = any(owner.partition(".")[0] == room for owner in OWNED[package])
            assert owns or package not in imports, (room, package)


@pytest.mark.parametrize(
    ("hop", "message"),
    [
        (Hop(2, "x", "text.tokenizer", "x", "tunix_mlflow/text/tokenizer.py"), "no function x"),
        (Hop(2, "x", "text.attic", "x", "tunix_mlflow/text/attic.py"), "there is no"),
        (Hop(2, "x", "text.mask", "is_trained", "tunix_mlflow/text/answers.py"), "is not"),
        (Hop(2, "x", "data.rows", "lines", "tunix_mlflow/data/rows.py"), "goes back"),
        (Hop(3, "x", "text.mask", "is_trained", "tunix_mlflow/text/mask.py"), "comes after"),
    ],
)
def test_a_wrong_hop_is_found(hop: Hop, message: str) -> None:
    """The test of the tables can fail."""
    first = Hop(1, "x", "text.mask", "is_trained", "tunix_mlflow/text/mask.py")
    assert find_wrong([first]) == []
    [found] = find_wrong([first, hop])
    assert message in found
