"""`tunix-mlflow datasets ingest` and `build`: what makes a dataset."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunix_mlflow.cli import dataset_content
from tunix_mlflow.cli.arguments import Number
from tunix_mlflow.cli.dataset_arguments import filters, pairs, shares

if TYPE_CHECKING:
    from tunix_mlflow.data.datasets import LocalFiles
    from tunix_mlflow.runtime.report import Reporter

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_split = click.option(
    "--split",
    multiple=True,
    metavar="NAME=SHARE",
    help="Share of the prompts, by hash, unless the data has splits; train gets the rest."
    "  [default: validation=0.1, test=0.1]",
)
_EXCERPT = 600  # characters of an example


def _key(command: Any) -> Any:
    version = click.option("--version", required=True, help="v1, v2, ...")
    name = click.option("--name", required=True, help="The dataset's key without its version.")
    return name(version(command))


@click.command()
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


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="[SPLIT=]PATH|URI...")
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
    (.gz, .zst, .bz2, .xz), or folders of them, such as Hugging Face `datasets` folders. A URI is
    hf://datasets/OWNER/NAME@REVISION, or traces:/EXPERIMENT?filter=FILTER for MLflow's own traces,
    which become messages. Splits come from a row's `split`, from SPLIT=PATH, or from the names of
    several files (train, validation, test); without any, a tenth of the prompts becomes
    `validation` and a tenth `test`.

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
    with Terminal() as reporter, _as_files(files, reporter) as given:
        result = operations.ingest(
            given.names,
            key,
            origins=given.origins,
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
            plain(result.manifest)
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


def _as_files(named: Sequence[str], reporter: Reporter) -> AbstractContextManager[LocalFiles]:
    """Return the files with those of URIs; what that needs is loaded for such alone."""
    from tunix_mlflow.data.datasets import LocalFiles

    if not any(scheme in word for word in named for scheme in ("traces:/", "hf://")):
        return nullcontext(LocalFiles(list(named), {}))
    from tunix_mlflow.pipelines.remote_files import as_files

    return as_files(named, reporter)


def _echo_built(built: Any, as_json: bool) -> None:
    from tunix_mlflow.cli.terminal import print_json

    manifest = built.manifest
    if as_json:
        print_json(plain(manifest) | {"created": built.created})
        return
    what = "stored" if built.created else "identical to what is there"
    click.echo(f"{manifest.key}: {manifest.count} examples ({splits_of(manifest)}), {what}")
    click.echo(f"digest {manifest.digest}")


def splits_of(manifest: Any) -> str:
    """Return the splits of a manifest and their sizes, in one text."""
    return ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())


def plain(manifest: Any) -> dict[str, Any]:
    """Return a manifest as JSON has it."""
    import msgspec

    tree: dict[str, Any] = msgspec.to_builtins(manifest)
    return tree
