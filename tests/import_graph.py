"""Who imports whom, read from the source: absolute, relative, lazy, for types, and by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PACKAGE = "tunix_mlflow"
FOLDERS = (PACKAGE, "projects", "seeds")
_BY_NAME = {"importlib.import_module", "importlib.__import__", "__import__", "pkgutil.resolve_name"}
_BY_PATH = {
    *("importlib.util.spec_from_file_location", "runpy.run_path", "runpy.run_module"),
    "importlib.machinery.SourceFileLoader",
}


class Import(NamedTuple):
    """One module that another names, or code that it loads without saying which."""

    name: str  # as resolved: a module, or a package and a name that is no module of it
    line: int
    is_lazy: bool = False  # within a function: it does not run when the module is imported
    is_for_types: bool = False  # under TYPE_CHECKING: it never runs
    problem: str = ""  # why the name is not known; the name is empty then


class Module(NamedTuple):
    path: str  # relative, with slashes
    source: str
    imports: list[Import]


Graph = dict[str, Module]


def read_sources(root: Path) -> dict[str, str]:
    """Return path -> source of all of the product's Python files."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def module_name(path: str) -> str:
    """`tunix_mlflow/data/__init__.py` is `tunix_mlflow.data`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_graph(sources: Mapping[str, str]) -> Graph:
    """Return every module, by its dotted name, with all its imports resolved."""
    modules = {module_name(path): path for path in sources}
    names = set(modules)
    for path in sources:  # a folder is a package without an __init__.py too
        names.update(".".join(parent.parts) for parent in PurePosixPath(path).parents)
    exports = lazy_exports(sources.get(f"{PACKAGE}/__init__.py", ""), names)
    graph: Graph = {}
    for name, path in modules.items():
        reader = _Reader(name, path.endswith("__init__.py"), names, exports)
        graph[name] = Module(path, sources[path], reader.read(ast.parse(sources[path])))
    return graph


def lazy_exports(root: str, modules: set[str]) -> dict[str, str]:
    """Return public name -> the module that defines it, from the source of `tunix_mlflow`.

    Both what is imported there for types and the table of the lazy attributes are read.
    """
    exports: dict[str, str] = {}
    for node in ast.walk(ast.parse(root)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                exports[alias.asname or alias.name] = full if full in modules else str(node.module)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                text, target = _text(key), (_text(value) or "").partition(":")[0]
                if text and target.startswith(f"{PACKAGE}."):
                    exports.setdefault(text, _module_part(target, modules))
    return exports


class _Reader:
    """Reads the imports of one module."""

    def __init__(
        self, name: str, is_package: bool, modules: set[str], exports: Mapping[str, str]
    ) -> None:
        self.package = name if is_package else name.rpartition(".")[0]
        self.name, self.modules, self.exports = name, modules, exports
        self.aliases: dict[str, str] = {}  # a local name -> the dotted name that it is bound to

    def read(self, tree: ast.Module) -> list[Import]:
        nodes = list(_walk(tree))
        for node, _, _ in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.aliases[alias.asname or bound] = bound
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.aliases[alias.asname or alias.name] = f"{self._base(node)}.{alias.name}"
        found = []
        for node, is_lazy, is_for_types in nodes:
            for name, problem in self._named(node):
                line = getattr(node, "lineno", 0)
                found.append(Import(name, line, is_lazy, is_for_types, problem))
        return found

    def _named(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """What one node names: (module, ""), or ("", why it is not known)."""
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield self._member(self._base(node), alias.name)
        elif isinstance(node, ast.Attribute):
            # `import tunix_mlflow`, and then an attribute of it that is fetched lazily.
            name = self._dotted(node)
            if name and name.count(".") == 1 and name.startswith(f"{PACKAGE}."):
                yield self._member(*name.split("."))
        elif isinstance(node, ast.Call):
            function = self._dotted(node.func)
            if function in _BY_PATH:
                yield "", f"{function} loads code by its path"
            elif function in _BY_NAME:
                yield self._by_name(node, function)

    def _member(self, base: str, name: str) -> tuple[str, str]:
        full = f"{base}.{name}"
        if base != PACKAGE or full in self.modules:
            # A module, or what the module `base` defines; a foreign one is named with both.
            ours = base.partition(".")[0] in FOLDERS
            return (full if not ours or full in self.modules else base), ""
        if name in self.exports:
            return self.exports[name], ""
        if name.startswith("__"):
            return PACKAGE, ""
        return "", f"{PACKAGE} has no {name}"

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        return resolve_name("." * node.level + (node.module or ""), self.package)

    def _by_name(self, node: ast.Call, function: str) -> tuple[str, str]:
        words = {word.arg: word.value for word in node.keywords}
        first = node.args[0] if node.args else words.get("name")
        name = _text(first)
        if name is None:
            shown = ast.unparse(first) if first is not None else ""
            return "", f"{function}({shown}): which module is not known"
        name = name.partition(":")[0]
        if name.startswith("."):
            anchor = node.args[1] if len(node.args) > 1 else words.get("package")
            package = _text(anchor)
            if isinstance(anchor, ast.Name) and anchor.id in ("__package__", "__name__"):
                package = self.package if anchor.id == "__package__" else self.name
            if package is None:
                return "", f"{function}({name!r}): relative to what is not known"
            name = resolve_name(name, package)
        return _module_part(name, self.modules), ""

    def _dotted(self, node: ast.AST) -> str | None:
        """The dotted name of an expression, by what its first word was imported as."""
        if isinstance(node, ast.Attribute):
            left = self._dotted(node.value)
            return left and f"{left}.{node.attr}"
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id if node.id == "__import__" else None)
        return None


def _walk(
    node: ast.AST, is_lazy: bool = False, is_for_types: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    """A node and all below it: (node, within a function, for types alone)."""
    yield node, is_lazy, is_for_types
    if isinstance(node, ast.If):
        test: ast.expr = node.test
        negated = False
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, negated = test.operand, True
        typed = _is_false_at_run_time(test)
        yield from _walk(node.test, is_lazy, is_for_types)
        for body, typed_here in (
            (node.body, typed and not negated),
            (node.orelse, typed and negated),
        ):
            for statement in body:
                yield from _walk(statement, is_lazy, is_for_types or typed_here)
    else:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, is_lazy or is_function, is_for_types)


def _is_false_at_run_time(test: ast.expr) -> bool:
    """Whether a condition is TYPE_CHECKING, however it was imported, or that and more."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_false_at_run_time(value) for value in test.values)
    return ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING"


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _module_part(name: str, modules: set[str]) -> str:
    """A module of ours without the attribute behind it; any other name as it is."""
    while name not in modules and name.startswith(f"{PACKAGE}.") and name.count(".") > 1:
        if name.rpartition(".")[0] not in modules:
            break
        name = name.rpartition(".")[0]
    return name


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the shortest circle through each node that is in one, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(edges):
        paths, seen = [[start]], set[str]()
        while paths:
            path = paths.pop(0)
            if path[-1] == start and len(path) > 1:
                found.setdefault(frozenset(path), path)
                break
            for target in sorted(edges.get(path[-1], set()) - seen):
                seen.add(target)
                paths.append([*path, target])
    return list(found.values())
