"""The rules of the rooms: tables, and functions that find what breaks them."""

from __future__ import annotations

from collections.abc import Mapping

from tests.import_graph import FOLDERS, PACKAGE, Graph, circles, read_graph

# Each room, lowest first; a room imports itself, its neighbours and what is in an earlier line.
ROOMS = (
    ("errors", "files", "paths", "version"),
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
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# What these may import of ours, however low the rest is.
ONLY = {
    "projects": ("tunix_mlflow.cli", "tunix_mlflow.runtime"),
    "seeds": ("tunix_mlflow.data",),
}
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
# Packages that only these rooms or modules may import, inside functions too.
_JAX_ROOMS = {"runtime.devices", "models", "training", "pipelines", "benchmarks", "integrations"}
OWNED = {
    "mlflow": {"tracking", "pipelines", "benchmarks", "integrations", "runtime.process"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "duckdb": {"data.catalog"},
    "jax": _JAX_ROOMS,
    "jaxlib": _JAX_ROOMS,
    "flax": {"models", "training", "benchmarks", "integrations"},
    "optax": {"training", "benchmarks", "integrations"},
    "orbax": {"models", "training", "integrations"},
    "safetensors": {"models.hub", "benchmarks"},
    "tokenizers": {"text.hub_tokenizer", "models.hub", "benchmarks"},
    "jinja2": {"text.chat_template"},
    "gguf": {"models.hub"},
    "huggingface_hub": {"models.hub"},
    "tunix": {"integrations", "benchmarks"},
    "matplotlib": {"benchmarks"},
    "sqlalchemy": {"benchmarks"},
    **{name: {"benchmarks"} for name in ("torch", "transformers", "datasets", "trl", "peft")},
}
# The last resort of a process that fails: it tells MLflow, and must not load it before.
LAZY = {("runtime.process", "mlflow")}
# Modules that load code by a name or a path that is not in the source.
DYNAMIC = {
    "tunix_mlflow": "its public names are fetched from the table when they are asked for",
    "tunix_mlflow.data.seeds": "a seed of a file is loaded by its path",
}
LONGEST = 450
REASON = f"longer than {LONGEST} lines because"


def short(module: str) -> str:
    """tunix_mlflow.data.catalog -> data.catalog."""
    return module.removeprefix(f"{PACKAGE}.")


def room_of(module: str) -> str:
    return short(module).partition(".")[0]


def is_below(module: str, parents: set[str] | tuple[str, ...]) -> bool:
    """Whether a module is one of the parents or in one of these packages."""
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def find_upward(graph: Graph) -> list[str]:
    """Imports of a higher room, those for types included: a type from above is knowledge too."""
    found = []
    for name, module in graph.items():
        room = room_of(name)
        for one in module.imports:
            target = room_of(one.name)
            if one.name.partition(".")[0] not in FOLDERS or PACKAGE in (name, one.name):
                continue
            at = f"{module.path}:{one.line}: {name} imports {one.name}"
            if target in ("projects", "seeds"):
                found.append(f"{at}; nothing does")
            elif room in ONLY:
                if not is_below(one.name, ONLY[room]):
                    found.append(f"{at}, not only {' and '.join(ONLY[room])}")
            elif room not in LEVEL or target not in LEVEL:
                found.append(f"{at}: one of them is in no room")
            elif LEVEL[target] > LEVEL[room]:
                found.append(f"{at}, which is above it")
    return found


def find_foreign(graph: Graph) -> list[str]:
    """Imports of a package that belongs to other rooms, or lazily only; not those for types."""
    found = []
    for name, module in graph.items():
        for one in module.imports:
            package = one.name.partition(".")[0]
            if package not in OWNED or one.is_for_types:
                continue
            at = f"{module.path}:{one.line}: {name} imports {one.name}"
            if not is_below(short(name), OWNED[package]):
                found.append(f"{at}, which only {', '.join(sorted(OWNED[package]))} may")
            elif (short(name), package) in LAZY and not one.is_lazy:
                found.append(f"{at}, which it may inside a function only")
    return found


def find_unresolved(graph: Graph) -> list[str]:
    """Imports whose module is not in the source, where no reason is given."""
    return [
        f"{module.path}:{one.line}: {one.problem}"
        for name, module in graph.items()
        for one in module.imports
        if one.problem and name not in DYNAMIC
    ]


def edges(graph: Graph, *, lazy: bool = True) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports when it runs; the root's table is no import."""
    return {
        name: {
            one.name
            for one in module.imports
            if one.name in graph and not one.is_for_types and (lazy or not one.is_lazy)
        }
        - {PACKAGE}
        for name, module in graph.items()
        if name != PACKAGE
    }


def find_module_circles(graph: Graph) -> list[str]:
    return [" -> ".join(circle) for circle in circles(edges(graph))]


def find_room_circles(graph: Graph) -> list[str]:
    rooms: dict[str, set[str]] = {}
    for name, targets in edges(graph).items():
        room = room_of(name)
        rooms.setdefault(room, set()).update({room_of(target) for target in targets} - {room})
    return [" -> ".join(circle) for circle in circles(rooms)]


def find_jax(graph: Graph) -> list[str]:
    """Ways to jax: of data, text and input none, of cli and plugins none without a call."""
    found = []
    for name in graph:
        never = is_below(short(name), ("data", "text", "input", "evaluation"))
        if not never and not is_below(short(name), ("cli", "tracking.plugins")):
            continue
        follow = edges(graph, lazy=never)
        ways, seen = [[name]], {name}
        for way in ways:
            loads = [
                one.name
                for one in graph[way[-1]].imports
                if one.name.partition(".")[0] in JAX
                and not one.is_for_types
                and (never or not one.is_lazy)
            ]
            found += [" -> ".join([*way, load]) for load in loads[:1]]
            # To import a module is to import the packages that it is in.
            parents = {way[-1].rpartition(".")[0]} & follow.keys()
            for target in sorted((follow.get(way[-1], set()) | parents) - seen):
                seen.add(target)
                ways.append([*way, target])
    return found


def find_long(sources: Mapping[str, str]) -> list[str]:
    return [
        f"{path}: {len(lines)} lines, and no line of its first 15 says {REASON!r} ..."
        for path, lines in ((path, source.splitlines()) for path, source in sources.items())
        if len(lines) > LONGEST and not any(REASON in line for line in lines[:15])
    ]


def find_large_room(sources: Mapping[str, str]) -> list[str]:
    """Rooms of a quarter of all lines or more."""
    sizes: dict[str, int] = {}
    for name, module in read_graph(sources).items():
        room = room_of(name)
        sizes[room] = sizes.get(room, 0) + len(module.source.splitlines())
    total = sum(sizes.values())
    return [f"{room}: {n} of {total} lines" for room, n in sizes.items() if 4 * n >= total]
