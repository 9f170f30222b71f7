"""The words of the code: plain technical English in names, comments, messages, help and pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from tests.conftest import ROOT
from tunix_mlflow.cli.main import cli


class Phrase(NamedTuple):
    pattern: str  # words with single spaces between: each stands for any white space
    instead: str
    examples: tuple[str, ...]


# A formatted value of an f-string is shown as {}.
PHRASES = (
    Phrase(
        r"(go|goes|going|gone|went) on with",
        "resume, continue",
        ("goes on with run 7", "went on with", "Go on with", "going on\nwith"),
    ),
    Phrase(r"mend(s|ed|ing|er)?", "fix", ("mend", "mends", "Mended", "mending")),
    Phrase(
        r"(tell|tells|told|telling) (MLflow|it|the server) what (it|MLflow) (does not|doesn't"
        r"|did not|didn't) have",
        "upload pending records",
        ("tell MLflow what it does not have", "Told MLflow what it did not have"),
    ),
    Phrase(
        r"taken up (by another|the run|this run|a run)|(takes?|took|taking) up (the|this|a) run",
        "lease lost to another process",
        ("was taken up by another process", "has taken up the run"),
    ),
    Phrase(r"believ(e|es|ed|able)", "trust", ("runs they can believe", "resume and believe")),
    Phrase(
        r"([0-9]|\{\})( ?[x%])? by (the )?(Peft ?Trainer|HF ?Trainer)|\| by (Peft|HF) ?Trainer",
        "times PeftTrainer",
        ("1.7 by PeftTrainer", "{} by PeftTrainer", "| by PeftTrainer |", "0.9 by HF Trainer"),
    ),
    Phrase(
        r"(wall|CPU)( time)? by (the )?floor",
        "ratio to the floor",
        ("wall by floor", "CPU by floor"),
    ),
    Phrase(
        r"(large|larger|largest|big|bigger|small|smaller|fast|faster|fastest) products?",
        "large matmul",
        ("a large product", "faster products", "larger products"),
    ),
    Phrase(
        r"comput(e|es|ed|ing) again",
        "rematerialization, recomputed",
        ("blocks computed again", "computes again"),
    ),
    Phrase(
        r"(whole or )?by adapters?|trained whole",
        "full fine-tuning or LoRA",
        ("whole or by adapters", "by adapters", "was trained whole"),
    ),
    Phrase(r"way back", "the backward pass", ("the way back", "on its way back")),
    Phrase(
        r"(stand|stands|standing|stood) in two|fields? (stand|stands|stood)",
        "is in two, where a field is",
        ("stands in two", "where a field stands", "ever stand in two splits"),
    ),
    Phrase(
        r"(train|end|run|continue|work|load|upload|start)(s|ed|d|ing)? all the same",
        "anyway",
        ("trains all the same", "training all the same", "the run ends all the same"),
    ),
)

# Names that were private words, each with the modules that it was used in and with what replaced
# it there; a conversation's turns or a file's pieces elsewhere are what they are called.
_DECODER = ("models/*.py",)
_TRAINING = ("training/*.py", "config/*.py", "pipelines/*.py")
_LOOP = ("training/*.py",)
_TRACKING = ("tracking/run.py", "tracking/record/*.py", "tracking/sync/*.py", "tracking/runs/*.py")
IDENTIFIERS = {
    "sight": ("AttentionContext", _DECODER),
    "product": ("Linear", _DECODER),
    "turns": ("rope_sin_cos", _DECODER),
    "noise": ("dropout_key", _DECODER),
    "piece": ("fold_in", _DECODER),
    "shares": ("probabilities", _DECODER),
    "looked_up": ("blockwise_attention", _DECODER),
    "weighed": ("weighted_values", _DECODER),
    "flight": ("PendingStep", _LOOP),
    "land": ("flush_pending", _LOOP),
    "room": ("available_bytes", _TRAINING),
    "judge": ("check_memory", _LOOP),
    "verdict": ("MemoryReport", _LOOP),
    "fresh": ("init_state", _LOOP),
    "whole": ("merged_params", _LOOP),
    "settle": ("resolve_auto", _TRAINING),
    "settled": ("inherit_auto", _TRAINING),
    "known": ("RunLink", _TRACKING),
    "outbox": ("EventLog", _TRACKING),
    "journal": ("MetricsLog", _TRACKING),
    "shipper": ("SyncWorker", _TRACKING),
}
ALLOWED = {
    ("models/bundle.py", "turns"),  # of a conversation
    ("models/*.py", "dot_product_attention"),  # jax.nn's
}


def words_of(name: str) -> list[str]:
    """goes_on_with and GoesOnWith are goes on with."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)]


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every function, class, variable, parameter, attribute and import."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        for field in ("id", "attr", "arg", "name", "asname", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        if isinstance(node, ast.Global | ast.Nonlocal):
            yield from ((line, name) for name in node.names)
        if isinstance(node, ast.MatchClass):
            yield from ((line, name) for name in node.kwd_attrs)


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string, docstrings and f-strings among them, and block of comments."""

    def strings(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.JoinedStr):
            values = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield node.lineno, "".join(map(str, values))
            for value in node.values:
                if isinstance(value, ast.FormattedValue):
                    yield from strings(value.value)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.lineno, node.value
        else:
            for child in ast.iter_child_nodes(node):
                yield from strings(child)

    yield from strings(ast.parse(source))
    first, block = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != first + len(block):
                yield first, "\n".join(block)
                first, block = token.start[0], []
            block.append(token.string.lstrip("#: "))
    yield first, "\n".join(block)


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of words, none of which is a part of a longer word."""
    spaced = pattern.replace(" ?", r"\s?").replace(" ", r"\s+")
    return re.compile(rf"(?<![^\W_])({spaced})(?![^\W_])", re.IGNORECASE)


ANY = compiled("|".join(phrase.pattern for phrase in PHRASES))
EACH = [(phrase, compiled(phrase.pattern)) for phrase in PHRASES]


def find_phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """(lines before it, phrase, what to write instead) of all that a text says."""
    if ANY.search(text):
        for phrase, pattern in EACH:
            for match in pattern.finditer(text):
                shown = " ".join(match[0].split())
                yield text.count("\n", 0, match.start()), shown, phrase.instead


def find_in_text(path: str, text: str, first: int = 1) -> list[str]:
    return [
        f"{path}:{first + line}: {shown!r} -> {instead}"
        for line, shown, instead in sorted(find_phrases(text))
    ]


def find_in_python(path: str, source: str) -> list[str]:
    """Phrases in a module's names and texts, and names that were private words of its part."""
    found = []
    for line, name in names_of(ast.parse(source)):
        found += find_in_text(path, " ".join(words_of(name)), line)
        shown = "_".join(words_of(name))
        for word, (instead, modules) in IDENTIFIERS.items():
            if (
                word in shown
                and re.search(rf"(^|_){word}s?(_|$)", shown)
                and is_one_of(path, modules)
                and not any(is_one_of(path, (m,)) and shown == n for m, n in ALLOWED)
            ):
                found.append(f"{path}:{line}: the name {name} -> {instead}")
    for line, text in texts_of(source):
        found += find_in_text(path, text, line)
    return sorted(set(found), key=lambda shown: int(shown.split(":")[1]))


def is_one_of(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a module is one of the listed; `*` is part of one name, so no folder below counts."""
    inside = path.removeprefix("tunix_mlflow/")
    return any(
        fnmatch(inside, module) and inside.count("/") == module.count("/") for module in modules
    )


def files(root: Path) -> list[Path]:
    """The product's modules and configurations, and the pages that users read."""
    folders = ("tunix_mlflow", "projects", "seeds")
    found = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found += [*(root / "projects").rglob("*.yaml"), *(root / "docs").rglob("*.md")]
    found += [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "MLproject")]
    return sorted(found)


def find_in_file(root: Path, path: Path) -> list[str]:
    shown, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    return find_in_python(shown, text) if path.suffix == ".py" else find_in_text(shown, text)


def find_in_help(command: click.Command, words: tuple[str, ...]) -> list[str]:
    """Phrases in the help of a command and of all commands below it."""
    result = CliRunner().invoke(command, ["--help"], prog_name=" ".join(words))
    assert result.exit_code == 0, result.output
    found = find_in_text(f"{' '.join(words)} --help", result.output)
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            found += find_in_help(child, (*words, name))
    return found


def test_code_and_pages_are_in_plain_words() -> None:
    """No name, comment, docstring, message or page has a phrase that was replaced."""
    found = [line for path in files(ROOT) for line in find_in_file(ROOT, path)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_help_is_in_plain_words() -> None:
    """Nor has the help of any command."""
    if found := find_in_help(cli, ("tunix-mlflow",)):
        pytest.fail("\n".join(found), pytrace=False)


EXAMPLES = [(phrase, example) for phrase in PHRASES for example in phrase.examples]
PLANTED = {
    "docstring": 'def f():\n    """Return what\n\n    {}, and more.\n    """\n',
    "message": "raise ValueError('first: ' + f'{{x}}, {}: {{x}}')\n",
    "message over two lines": "raise ValueError(\n    '{}'\n    ', then'\n)\n",
    "message within a value": "f'{{f(\"{}\")}}'\n",
    "field": 'class C:\n    x: int = 0\n    """{}; 0: none."""\n',
    "comment": "x = 1\n# First.\n#: {}.\n",
}


@pytest.mark.parametrize(("phrase", "example"), EXAMPLES, ids=[e for _, e in EXAMPLES])
def test_each_phrase_is_found(phrase: Phrase, example: str) -> None:
    """In a docstring, a message, a comment, a page and a command's help, with its line."""
    example = example.replace("\n", " ").replace("{}", "7")
    for place, template in PLANTED.items():
        source = template.format(example)
        line = 1 + source[: source.index(example)].count("\n")
        [found] = find_in_python("tunix_mlflow/planted.py", source)
        assert found.startswith(f"tunix_mlflow/planted.py:{line}: "), place
        assert found.endswith(f" -> {phrase.instead}"), place
    [found] = find_in_text("README.md", f"A page.\n\nIt {example}, too.")
    assert found.startswith("README.md:3: ")
    command = click.Command("x", help=f"First.\n\n{example}.", callback=lambda: None)
    option = click.Option(["--x"], help=f"{example}.")
    for planted in (command, click.Command("x", params=[option])):
        group = click.Group("group", commands=[planted])
        [found] = find_in_help(group, ("tunix-mlflow", "group"))
        assert found.startswith("tunix-mlflow group x --help:")
        assert found.endswith(f" -> {phrase.instead}")


@pytest.mark.parametrize(
    ("source", "instead"),
    [
        ("def goes_on_with(run): ...", "resume, continue"),
        ("x = 1\nclass WayBack: ...", "the backward pass"),
        ("def f(*, mend=False): ...", "fix"),
        ("run.was_taken_up_by_another = 1", "lease lost to another process"),
        ("f(wall_by_floor=1)", "ratio to the floor"),
        ("from x import faster_products", "large matmul"),
        ("import x as blocks_computed_again", "rematerialization, recomputed"),
        ("f'{whole_or_by_adapters}'", "full fine-tuning or LoRA"),
        ("match x:\n    case C(stands_in_two=1): ...", "is in two, where a field is"),
        ("def f():\n    global trains_all_the_same", "anyway"),
    ],
)
def test_a_phrase_is_found_in_a_name(source: str, instead: str) -> None:
    """Of a function, class, parameter, attribute, import: with underscores or capitals."""
    found = find_in_python("tunix_mlflow/planted.py", source)
    assert any(line.endswith(f"-> {instead}") for line in found)


def test_a_phrase_may_be_broken_over_lines() -> None:
    """Of a page, a docstring, a block of comments and strings that are joined."""
    broken = "it goes on\n{}with the run"
    assert find_in_text("README.md", broken.format("")) == [
        "README.md:1: 'goes on with' -> resume, continue"
    ]
    for source in (
        f'"""First.\n\n{broken.format("    ")}\n"""',
        "# " + broken.format("# "),
        "x = ('it goes on '\n     f'with {x}')",
        "x = f'{ratio:.1f} by PeftTrainer'",
    ):
        assert len(find_in_python("tunix_mlflow/planted.py", source)) == 1


def test_other_words_are_not_found() -> None:
    """What only resembles a phrase is left alone."""
    plain = (
        "recommend, amended, commendable; training goes on; large matrix products; wall time;"
        " by PeftTrainer; they are all the same; it stands in line; adapters are merged;"
        " production; computed once; told; the way to go; low-rank adapters by name"
    )
    assert find_in_text("README.md", plain) == []


@pytest.mark.parametrize("word", IDENTIFIERS)
def test_a_private_word_counts_where_it_comes_from(word: str) -> None:
    """As a name, or a part of one, in the modules of its part; nowhere else, and in no text."""
    instead, modules = IDENTIFIERS[word]
    inside = f"tunix_mlflow/{modules[0].replace('*', 'planted')}"
    capital = "".join(part.capitalize() for part in word.split("_"))
    for name in (word, f"_{word}", capital, f"first_{word}", f"{word}_of_all", word.upper()):
        for source in (f"{name} = 1", f"def {name}(): ...", f"f'{{x.{name}}}'", f"f({name}=1)"):
            found = find_in_python(inside, source)
            assert f"{inside}:1: the name {name} -> {instead}" in found
    assert find_in_python("tunix_mlflow/data/planted.py", f"{word} = 1") == []
    assert find_in_python(inside, f"# {word}\nx = '{word}'\nun{word}ed = 1") == []


def test_what_is_called_so_elsewhere_may_be() -> None:
    """A conversation has turns, and jax.nn a function with another word's name."""
    source = "turns = jnp.dot_product_attention"
    assert find_in_python("tunix_mlflow/models/bundle.py", source) == []
    assert find_in_python("tunix_mlflow/models/planted.py", source)
    assert find_in_python("tunix_mlflow/models/bundle.py", "product = turns")


def test_the_modules_of_the_words_exist() -> None:
    """An entry that fits no file would hold nothing."""
    paths = [path.relative_to(ROOT).as_posix() for path in files(ROOT)]
    listed = {module for _, modules in IDENTIFIERS.values() for module in modules}
    assert {m for m in listed if not any(is_one_of(path, (m,)) for path in paths)} == set()
