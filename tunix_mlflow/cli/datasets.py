"""`tunix-mlflow datasets`: the catalog's commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from tunix_mlflow.cli import dataset_content, dataset_making
from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.cli.dataset_making import plain, splits_of

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_SHOWN = 100  # names of a kind


@click.group()
def datasets() -> None:
    """Build, inspect and verify the datasets of the catalog."""


datasets.add_command(dataset_making.build)
datasets.add_command(dataset_making.ingest)
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
        print_json([plain(manifest) for manifest, _ in listing])
    elif not listing:
        click.echo("no datasets yet; `tunix-mlflow seed golden-v2` makes one")
    else:
        table.echo(
            ("KEY", "EXAMPLES", "DIGEST", "BUILT", "SPLITS"),
            [
                (m.key, m.count, m.digest[:12], f"{built:%Y-%m-%d %H:%M}", splits_of(m))
                for m, built in listing
            ],
        )


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


def _echo_names(kind: str, names: Iterable[str]) -> None:
    names = list(names)
    for name in names[:_SHOWN]:
        click.echo(f"{kind}: {name}")
    if len(names) > _SHOWN:
        click.echo(f"{kind}: and {len(names) - _SHOWN:,} more (--json)")
