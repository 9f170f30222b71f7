"""`tunix-mlflow datasets`: list, show, build, ingest, verify, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tunix_mlflow.data.examples import Example
    from tunix_mlflow.data.manifest import Manifest

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def datasets() -> None:
    """Tend the catalog of datasets."""


@datasets.command("list")
@_json
def list_(as_json: bool) -> None:
    """All datasets, oldest first."""
    from tunix_mlflow import state
    from tunix_mlflow.data import catalog

    found = catalog.listing(state.catalog_path())
    if as_json:
        _print([_plain(manifest) for manifest, _ in found])
        return
    if not found:
        click.echo("no datasets yet; `tunix-mlflow seed golden-v2` makes one")
    for manifest, built in found:
        splits = ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())
        click.echo(
            f"{manifest.key:24} {manifest.count:>9,}  {manifest.digest[:12]}"
            f"  {built:%Y-%m-%d %H:%M}  {splits}"
        )


@datasets.command()
@click.argument("key")
@click.option("--limit", type=click.IntRange(1), default=3, help="Examples shown.")
@click.option("--mask", is_flag=True, help="Show the tokens, and which are trained on.")
@click.option("--answer-only", is_flag=True, help="With --mask: as with data.include_steps=false.")
@_json
def show(key: str, limit: int, mask: bool, answer_only: bool, as_json: bool) -> None:
    """A dataset's manifest, statistics and first examples."""
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data import examples, snapshot

    manifest = operations.ready(key, lambda message: click.echo(message, err=True))
    found = snapshot.read(manifest.digest)[:limit]
    if as_json:
        shown = [json.loads(examples.canonical_text(e)) for e in found]
        _print(_plain(manifest) | {"examples": shown})
        return
    click.echo(f"{manifest.key}: {manifest.count} examples, digest {manifest.digest}")
    for name, split in manifest.splits.items():
        click.echo(f"  split {name}: {split.count} examples, digest {split.digest}")
    for name, value in {**manifest.stats, **manifest.request}.items():
        click.echo(f"  {name}: {value}")
    for example in found:
        click.echo("")
        click.echo(_masked(example, answer_only) if mask else _readable(example))


@datasets.command()
@click.option("--name", required=True, help="Name of the dataset, the key without its version.")
@click.option("--version", required=True, help="v1, v2, ...")
@click.option("--limit", type=int, help="At most so many examples.")
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="A meta value to match.")
@click.option("--select", type=click.Choice(["latest", "random"]), default="latest")
@click.option("--seed", type=int, default=0, help="For --select random.")
@click.option("--test-fraction", type=float, default=0.1, help="Share of prompts held out.")
@_json
def build(
    name: str,
    version: str,
    limit: int | None,
    where: tuple[str, ...],
    select: str,
    seed: int,
    test_fraction: float,
    as_json: bool,
) -> None:
    """Make a dataset of examples that the catalog has.

    A VALUE is JSON if it can be read as such (3, true, "3"), else text.
    """
    import msgspec

    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.manifest import Selection
    from tunix_mlflow.errors import DatasetError

    asked = {
        "filters": dict(_filter(text) for text in where),
        "order": select,
        "seed": seed,
        "limit": limit,
        "test_fraction": test_fraction,
    }
    try:
        selection = msgspec.convert(asked, Selection)
    except msgspec.ValidationError as error:
        raise DatasetError(f"the request cannot be met: {error}") from error
    _report(operations.build(f"{name}-{version}", selection), as_json)


@datasets.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the dataset, the key without its version.")
@click.option("--version", required=True, help="v1, v2, ...")
@click.option("--test-fraction", type=float, default=0.1, help="Share of prompts held out.")
@_json
def ingest(file: Path, name: str, version: str, test_fraction: float, as_json: bool) -> None:
    """Store the traces of a JSONL file as a dataset: all of them, or none.

    \b
    A line: {"prompt": "...", "steps": [{"type": "...", "content": "..."}], "answer": "...",
             "split": "train", "meta": {"topic": "..."}}       split and meta are optional
    """
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.errors import DatasetError

    if not 0 <= test_fraction < 1:
        raise DatasetError(f"--test-fraction {test_fraction}: expected 0 or more, less than 1")
    _report(operations.ingest(file, f"{name}-{version}", test_fraction=test_fraction), as_json)


@datasets.command()
@click.argument("key")
@_json
def verify(key: str, as_json: bool) -> None:
    """Prove that the catalog holds exactly what the manifest says.

    Names what is missing, extra, changed or duplicated; exit code 3 if anything is.
    """
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations

    report = operations.verify(key)
    kinds = ("missing", "extra", "changed", "duplicated")
    named = {kind: [canonical.id_of(d) for d in getattr(report, kind)] for kind in kinds}
    if as_json:
        _print({"key": key, "ok": report.ok, **named, "notes": report.notes})
    elif report.ok:
        click.echo(f"{key}: exactly what its manifest says")
    else:
        for kind in kinds:
            for name in named[kind]:
                click.echo(f"{kind}: {name}")
        for note in report.notes:
            click.echo(note)
    sys.exit(0 if report.ok else 3)


@datasets.command()
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path))
@_json
def export(key: str, file: Path, as_json: bool) -> None:
    """Write a dataset as JSONL, in the form that `ingest` reads."""
    from tunix_mlflow.data import datasets as operations

    lines = operations.export(key, file)
    if as_json:
        _print({"key": key, "file": str(file), "lines": lines})
    else:
        click.echo(f"{lines} lines in {file}")


def _report(built: Any, as_json: bool) -> None:
    manifest = built.manifest
    if as_json:
        _print(_plain(manifest) | {"created": built.created})
        return
    what = "stored" if built.created else "identical to what is there"
    splits = ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())
    click.echo(f"{manifest.key}: {manifest.count} examples ({splits}), {what}")
    click.echo(f"digest {manifest.digest}")


def _filter(text: str) -> tuple[str, Any]:
    from tunix_mlflow.data import canonical
    from tunix_mlflow.errors import DatasetError

    key, equals, value = text.partition("=")
    if not equals:
        raise DatasetError(f"--where {text!r}: expected KEY=VALUE")
    try:
        return key, canonical.decode(value)
    except ValueError:
        return key, value


def _readable(example: Example) -> str:
    lines = [f"{m.role}: {m.content}" for m in example.messages]
    lines += [f"  {step.i}. ({step.type}) {step.content}" for step in example.steps]
    if example.answer is not None:
        lines.append(f"answer: {example.answer}")
    if example.meta:
        lines.append(f"meta: {json.dumps(example.meta, sort_keys=True)}")
    return "\n".join(lines)


def _masked(example: Example, answer_only: bool) -> str:
    from itertools import groupby

    from tunix_mlflow.data import chat
    from tunix_mlflow.data.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    ids, trained = tokenizer.encode(chat.render(example, include_steps=not answer_only))
    lines = []
    for is_trained, part in groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1])):
        tokens = [int(token) for token, _ in part]
        kind = "trained" if is_trained else "ignored"
        lines.append(f"{kind} {len(tokens):>4} tokens  {tokenizer.decode(tokens)!r}")
    return "\n".join(lines)


def _plain(manifest: Manifest) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return plain


def _print(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))
