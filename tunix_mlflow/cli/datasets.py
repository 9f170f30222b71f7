"""`tunix-mlflow datasets`: the catalog's commands."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from tunix_mlflow.cli import dataset_content
from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.cli.dataset_arguments import filters, pairs, shares

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_split = click.option(
    "--split",
    multiple=True,
    metavar="NAME=SHARE",
    help="Share of the prompts, by hash, unless the data has splits; train gets the rest."
    "  [default: validation=0.1, test=0.1]",
)
_SHOWN = 100  # names of a kind
_EXCERPT = 600  # characters of an example


def _key(command: Any) -> Any:
    version = click.option("--version", required=True, help="v1, v2, ...")
    name = click.option("--name", required=True, help="The dataset's key without its version.")
    return name(version(command))


@click.group()
def datasets() -> None:
    """Build, inspect and verify the datasets of the catalog."""


datasets.add_command(dataset_content.show)
datasets.add_command(dataset_content.sample)
datasets.add_command(dataset_content.stats)


@datasets.command("list")
@_json
def list_(as_json: bool) -> None:
    """List all datasets, the oldest first."""
    from tunix_mlflow import paths
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data.catalog import read

    listing = read.listing(paths.catalog_path())
    if as_json:
        print_json([_plain(manifest) for manifest, _ in listing])
    elif not listing:
        click.echo("no datasets yet; `tunix-mlflow seed golden-v2` makes one")
    else:
        table.echo(
            ("KEY", "EXAMPLES", "DIGEST", "BUILT", "SPLITS"),
            [
                (m.key, m.count, m.digest[:12], f"{built:%Y-%m-%d %H:%M}", _splits(m))
                for m, built in listing
            ],
        )


@datasets.command()
@_key
@click.option(
    "--limit", type=Number(1, 10_000_000), help="At most so many examples, up to 10,000,000."
)
@click.option(
    "--where", multiple=True, metavar="CONDITION", help="A condition on meta; may be repeated."
)
@click.option(
    "--select",
    type=click.Choice(["all", "latest", "random"]),
    default="latest",
    show_default=True,
    help="Which examples --limit keeps.",
)
@click.option("--seed", type=Number(0), default=0, show_default=True, help="For --select random.")
@_split
@click.option("--from", "parent", metavar="KEY", help="Select from this dataset's examples only.")
@_json
def build(
    name: str,
    version: str,
    limit: int | None,
    where: tuple[str, ...],
    select: str,
    seed: int,
    split: tuple[str, ...],
    parent: str | None,
    as_json: bool,
) -> None:
    """Build a dataset from examples that the catalog has.

    \b
    CONDITION: topic=math  topic!=math  level>=3  level<5  topic:math,logic  topic!:math,logic
    A value is JSON if it can be read as such (3, true, "3"), else text.
    """
    import msgspec

    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.manifest import Selection
    from tunix_mlflow.errors import DatasetError

    request = {
        "filters": filters(where),
        "order": select,
        "seed": seed,
        "limit": limit,
        "parent": parent,
        **({"splits": shares(split)} if split else {}),
    }
    try:
        selection = msgspec.convert(request, Selection)
    except msgspec.ValidationError as error:
        raise DatasetError(f"the selection is not valid: {error}") from error
    _echo_built(operations.build(f"{name}-{version}", selection), as_json)


@datasets.command()
@click.argument("files", nargs=-1, required=True, metavar="[SPLIT=]PATH...")
@_key
@click.option("--format", "form", default="auto", show_default=True, help="One of the above.")
@click.option(
    "--map",
    "mapping",
    multiple=True,
    metavar="FIELD=COLUMN",
    help=r"The column of a field, a.b inside it, or several joined: 'prompt={title}\n\n{body}'.",
)
@click.option("--encoding", help="Of text files, if it is not UTF-8: utf-16, latin-1, ...")
@_split
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave bad rows out, and write them with the reasons to NAME-VERSION.rejects.jsonl.",
)
@click.option("--rejects", type=click.Path(path_type=Path), help="Another file for --skip-bad.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="limits.KEY=N",
    help="Raise a limit, for example limits.prompt_characters=200000.",
)
@click.option("--config", "config_file", metavar="FILE", help="YAML file with a section limits.")
@_json
def ingest(
    files: tuple[str, ...],
    name: str,
    version: str,
    form: str,
    mapping: tuple[str, ...],
    encoding: str | None,
    split: tuple[str, ...],
    skip_bad: bool,
    rejects: Path | None,
    settings: tuple[str, ...],
    config_file: str | None,
    as_json: bool,
) -> None:
    """Store the examples of files as a dataset: all of them, or none.

    JSON (a row a line, or an array), CSV, TSV, Parquet, Arrow or text files, compressed or not
    (.gz, .zst, .bz2, .xz), or folders of them, such as Hugging Face `datasets` folders. Splits
    come from a row's `split`, from SPLIT=PATH, or from the names of several files (train,
    validation, test); without any, a tenth of the prompts becomes `validation` and a tenth `test`.

    \b
    FORMAT is auto, or one of
      trace              {"prompt", "steps": [{"content"}], "answer", "split", "meta"}
      messages           {"messages": [{"role", "content", "tool_calls", "trained"}], "tools"}
      prompt-completion  {"prompt", "completion", "tools"}; input and output, problem and solution
      instruction        {"instruction", "input" or "context", "output" or "response"}
      question-answer    {"question", "context", "answer": "work #### result", or "answers"}
      preference         {"prompt", "chosen", "rejected"}, or {"prompt", "completion", "label"}
      text               {"text"}
    In formats other than trace, other columns become meta.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.data import datasets as operations

    config = load_config(config_file, dict(pairs(settings, "--set")))
    key = f"{name}-{version}"
    rejected = (rejects or Path(f"{key}.rejects.jsonl")) if skip_bad or rejects else None
    with Terminal() as reporter:
        result = operations.ingest(
            files,
            key,
            form=form,
            mapping=dict(pairs(mapping, "--map")),
            splits=shares(split) if split else None,
            limits=config.limits,
            encoding=encoding,
            skip_bad=rejected,
            progress=lambda done, total: reporter.progress("reading bytes", done, total, {}),
        )
    if as_json:
        more: dict[str, Any] = {"rows": result.rows, "duplicates": result.duplicates}
        more |= {"rejected": result.rejected, "unused": result.unused}
        file = {"rejects": str(rejected)} if rejected else {}
        print_json(
            _plain(result.manifest)
            | {"created": result.created, "format": result.form}
            | more
            | file
        )
        return
    recognised = "recognised as" if form == "auto" else "read as"
    click.echo(
        f"{result.rows:,} rows {recognised} {result.form}: {result.duplicates:,} duplicates,"
        f" {result.rejected:,} left out" + (f", see {rejected}" if result.rejected else "")
    )
    if form == "auto":
        shown = dataset_content.readable(operations.first_example(key))
        click.echo(f"the first example:\n{textwrap.indent(shown, '  ')[:_EXCERPT]}")
    for column, characters in result.unused.items():
        click.echo(
            f"warning: the column {column!r} with {characters:,} characters of text becomes meta,"
            " and is not trained on; --map joins columns"
        )
    if result.form == "preference":
        click.echo("preference data is kept for later use; supervised training does not take it")
    if count := result.validation_from_train:
        click.echo(f"the data has no validation split: {count:,} train examples became it")
    _echo_built(result, False)


@datasets.command()
@click.argument("key")
@_json
def verify(key: str, as_json: bool) -> None:
    """Check that the catalog contains exactly what the manifest says.

    Names the examples that are missing, extra, changed, duplicated, or in another split, in the
    catalog or in the snapshot; exit code 3 if there are any.
    """
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog.verify import KINDS

    report = operations.verify(key)
    named = {kind: [canonical.id_of(d) for d in getattr(report, kind)] for kind in KINDS}
    if as_json:
        print_json({"key": key, "ok": report.ok, **named, "notes": report.notes})
    elif report.ok:
        click.echo(f"{key}: exactly what its manifest says")
    else:
        for kind, names in named.items():
            _echo_names(kind.replace("_", " "), names)
        for note in report.notes:
            click.echo(note)
    sys.exit(0 if report.ok else 3)


@datasets.command()
@click.argument("before", metavar="KEY")
@click.argument("after", metavar="OTHER")
@click.option(
    "--examples",
    type=Number(0),
    default=3,
    show_default=True,
    help="To show of each kind.",
)
@_json
def diff(before: str, after: str, examples: int, as_json: bool) -> None:
    """Show the differences between two datasets.

    An example that was replaced by another with the same prompt is `changed`.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog import read
    from tunix_mlflow.data.examples import from_canonical

    difference = operations.diff(before, after)
    added, removed, changed, moved = (
        difference.added,
        difference.removed,
        difference.changed,
        difference.moved,
    )
    if as_json:
        print_json(
            {
                "added": [canonical.id_of(d) for d in added],
                "removed": [canonical.id_of(d) for d in removed],
                "changed": [[canonical.id_of(d) for d in pair] for pair in changed],
                "moved": [[canonical.id_of(d), was, now] for d, was, now in moved],
            }
        )
        return
    click.echo(
        f"{before} -> {after}: {len(added):,} added, {len(removed):,} removed,"
        f" {len(changed):,} changed, {len(moved):,} in another split"
    )
    shown = [("+", d) for d in added[:examples]] + [("-", d) for d in removed[:examples]]
    for old, new in changed[:examples]:
        shown += [("-", old), ("+", new)]
    texts = read.texts(paths.catalog_path(), [digest for _, digest in shown])
    for sign, digest in shown:
        click.echo(f"\n{sign} {canonical.id_of(digest)}")
        if digest in texts:
            click.echo(dataset_content.readable(from_canonical(texts[digest])))
    for digest, was, now in moved[:examples]:
        click.echo(f"\n{canonical.id_of(digest)}: {was} -> {now}")


@datasets.command("check-leakage")
@click.argument("trained", metavar="KEY")
@click.argument("evaluated", metavar="EVALUATION")
@click.option("--train-split", default="train", show_default=True, help="Split of KEY.")
@click.option("--split", help="Split of EVALUATION.  [default: all]")
@_json
def check_leakage(
    trained: str, evaluated: str, train_split: str, split: str | None, as_json: bool
) -> None:
    """Look for the prompts of an evaluation set in a training split; exit code 3 if there are any.

    By equal prompts, and by runs of eight words: a prompt overlaps if half of its runs are in the
    training split. Both datasets may be given by digest; then only their snapshots are read.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations

    manifests = [operations.ready(key, Terminal().info) for key in (trained, evaluated)]
    leakage = operations.check_leakage(manifests[0], train_split, manifests[1], split)
    exact = [canonical.id_of(d) for d in leakage.exact]
    overlapping = [canonical.id_of(d) for d in leakage.overlapping]
    if as_json:
        print_json(
            {"ok": leakage.ok, **leakage.figures(), "prompts": leakage.prompts}
            | {"exact": exact, "overlapping": overlapping}
        )
    else:
        click.echo(
            f"{len(exact):,} of {leakage.prompts:,} prompts are trained on, {len(overlapping):,}"
            f" overlap by half of their 8-grams or more; {leakage.found:,} of {leakage.grams:,}"
            " 8-grams found"
        )
        _echo_names("exact", exact)
        _echo_names("overlapping", overlapping)
    sys.exit(0 if leakage.ok else 3)


@datasets.command()
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["trace", "messages", "prompt-completion", "text", "gemma"]),
    default="trace",
    show_default=True,
    help="Of the rows.",
)
@_json
def export(key: str, file: Path, form: str, as_json: bool) -> None:
    """Write a dataset to FILE.jsonl, FILE.jsonl.gz or FILE.parquet.

    `ingest` reads the formats trace, messages, prompt-completion and text; gemma is text with
    Gemma's turn markers.
    """
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data import datasets as operations

    lines = operations.export(key, file, form)
    if as_json:
        print_json({"key": key, "file": str(file), "format": form, "lines": lines})
    else:
        click.echo(f"wrote {lines:,} examples to {file}")


@datasets.command()
@click.option("--yes", is_flag=True, help="Delete; without it, only show what would be deleted.")
@_json
def gc(yes: bool, as_json: bool) -> None:
    """Delete files left by killed processes, and examples that no dataset has.

    Snapshots are kept: runs and registered models refer to them.
    """
    import shutil

    from tunix_mlflow import paths
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog import store

    leftovers = operations.leftovers()
    count, size = (0, 0)
    if paths.catalog_path().exists():
        count, size = store.unreferenced(paths.catalog_path(), remove=yes)
    if yes:
        for path, _ in leftovers:
            shutil.rmtree(path, ignore_errors=True)
    total = size + sum(each for _, each in leftovers)
    if as_json:
        names = [str(path) for path, _ in leftovers]
        print_json({"leftovers": names, "examples": count, "bytes": total, "removed": yes})
        return
    done = "deleted" if yes else "would delete"
    click.echo(f"{done} {count:,} examples and {len(leftovers)} leftovers, {total / 1e6:,.1f} MB")
    if not yes and (leftovers or count):
        click.echo("add --yes to do it")


def _echo_built(built: Any, as_json: bool) -> None:
    from tunix_mlflow.cli.terminal import print_json

    manifest = built.manifest
    if as_json:
        print_json(_plain(manifest) | {"created": built.created})
        return
    what = "stored" if built.created else "identical to what is there"
    click.echo(f"{manifest.key}: {manifest.count} examples ({_splits(manifest)}), {what}")
    click.echo(f"digest {manifest.digest}")


def _echo_names(kind: str, names: Iterable[str]) -> None:
    names = list(names)
    for name in names[:_SHOWN]:
        click.echo(f"{kind}: {name}")
    if len(names) > _SHOWN:
        click.echo(f"{kind}: and {len(names) - _SHOWN:,} more (--json)")


def _splits(manifest: Any) -> str:
    return ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())


def _plain(manifest: Any) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return plain
