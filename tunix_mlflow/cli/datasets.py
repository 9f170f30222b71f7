"""`tunix-mlflow datasets`: the catalog's commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tunix_mlflow.data.examples import Example
    from tunix_mlflow.data.manifest import Manifest
    from tunix_mlflow.text.tokenizer import Tokenizer

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_split = click.option(
    "--split",
    multiple=True,
    metavar="NAME=SHARE",
    help="Share of the prompts, by hash, unless the data has splits; train gets the rest."
    "  [default: validation=0.1, test=0.1]",
)
_SHOWN = 100  # names of a kind
_OPERATORS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
_OPERATORS |= {":": "in", "!:": "not_in"}


def _key(command: Any) -> Any:
    version = click.option("--version", required=True, help="v1, v2, ...")
    name = click.option("--name", required=True, help="The dataset's key without its version.")
    return name(version(command))


@click.group()
def datasets() -> None:
    """Tend the catalog of datasets."""


@datasets.command("list")
@_json
def list_(as_json: bool) -> None:
    """All datasets, oldest first."""
    from tunix_mlflow import paths
    from tunix_mlflow.data.catalog import read

    found = read.listing(paths.catalog_path())
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
@click.option("--base", help="With --mask: by the tokenizer and template of this model.")
@_json
def show(
    key: str, limit: int, mask: bool, answer_only: bool, base: str | None, as_json: bool
) -> None:
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
    if manifest.parent is not None:
        click.echo(f"  parent: {manifest.parent}")
    for source in operations.provenance(key):
        click.echo(f"  from {source['file']}: {source['rows']} rows, sha256 {source['sha256']}")
    tokenizer = _tokenizer(base) if mask else None
    for example in found:
        click.echo("")
        if tokenizer is None:
            click.echo(_readable(example))
        else:
            click.echo(_masked(example, answer_only, tokenizer))


@datasets.command()
@_key
@click.option("--limit", type=int, help="At most so many examples, up to 10,000,000.")
@click.option(
    "--where", multiple=True, metavar="CONDITION", help="A condition on meta; may be repeated."
)
@click.option("--select", type=click.Choice(["all", "latest", "random"]), default="latest")
@click.option("--seed", type=int, default=0, help="For --select random.")
@_split
@click.option("--from", "parent", metavar="KEY", help="Take from this dataset's examples only.")
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
    """Make a dataset of examples that the catalog has.

    \b
    CONDITION: topic=math  topic!=math  level>=3  level<5  topic:math,logic  topic!:math,logic
    A value is JSON if it can be read as such (3, true, "3"), else text.
    """
    import msgspec

    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.manifest import Selection
    from tunix_mlflow.errors import DatasetError

    asked = {
        "filters": _filters(where),
        "order": select,
        "seed": seed,
        "limit": limit,
        "parent": parent,
        **({"splits": _shares(split)} if split else {}),
    }
    try:
        selection = msgspec.convert(asked, Selection)
    except msgspec.ValidationError as error:
        raise DatasetError(f"the request cannot be met: {error}") from error
    _report(operations.build(f"{name}-{version}", selection), as_json)


@datasets.command()
@click.argument("files", nargs=-1, required=True, metavar="[SPLIT=]PATH...")
@_key
@click.option("--format", "form", default="auto", show_default=True, help="See below.")
@click.option("--map", "mapping", multiple=True, metavar="FIELD=COLUMN", help="Where a field is.")
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
    split: tuple[str, ...],
    skip_bad: bool,
    rejects: Path | None,
    settings: tuple[str, ...],
    config_file: str | None,
    as_json: bool,
) -> None:
    """Store the examples of files as a dataset: all of them, or none.

    JSONL, JSONL.gz, Parquet or text files, or folders of them, Hugging Face `datasets` folders
    among them. Splits come from a row's `split`, from SPLIT=PATH, or from the names of several
    files (train, validation, test); without any, a tenth of the prompts becomes `validation` and
    a tenth `test`. Where the data has splits but no `validation`, a tenth of the train prompts
    becomes it.

    \b
    FORMAT is auto, or one of
      trace              {"prompt", "steps": [{"content"}], "answer", "split", "meta"}
      messages           {"messages": [{"role", "content", "reasoning", "trained"}]}
      prompt-completion  {"prompt", "completion"}
      question-answer    {"question", "answer": "work #### result"}
      text               {"text"}
    Columns that a format other than trace does not know become meta.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.data import datasets as operations

    presets = paths.project_root() / "projects" / "configs"
    settled = load_config(config_file, dict(_pairs(settings, "--set")), presets)
    key = f"{name}-{version}"
    kept = (rejects or Path(f"{key}.rejects.jsonl")) if skip_bad or rejects else None
    with _progress() as show:
        done = operations.ingest(
            files,
            key,
            form=form,
            mapping=dict(_pairs(mapping, "--map")),
            splits=_shares(split) if split else None,
            limits=settled.limits,
            skip_bad=kept,
            progress=show,
        )
    if as_json:
        more = {"rows": done.rows, "duplicates": done.duplicates, "rejected": done.rejected}
        kept_in = {"rejects": str(kept)} if kept else {}
        _print(
            _plain(done.manifest) | {"created": done.created, "format": done.form} | more | kept_in
        )
        return
    recognised = "recognised as" if form == "auto" else "read as"
    click.echo(
        f"{done.rows:,} rows {recognised} {done.form}: {done.duplicates:,} duplicates,"
        f" {done.rejected:,} left out" + (f", see {kept}" if done.rejected else "")
    )
    if without := done.manifest.stats["without_steps"]:
        click.echo(f"{without:,} examples have no reasoning steps")
    if taken := done.validation_from_train:
        click.echo(f"the data has no validation split: {taken:,} train examples became it")
    _report(done, False)


@datasets.command()
@click.argument("key")
@_json
def verify(key: str, as_json: bool) -> None:
    """Prove that the catalog holds exactly what the manifest says.

    Names what is missing, extra, changed, duplicated, or in another split, in the catalog or in
    the snapshot; exit code 3 if anything is.
    """
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog.verify import KINDS

    report = operations.verify(key)
    named = {kind: [canonical.id_of(d) for d in getattr(report, kind)] for kind in KINDS}
    if as_json:
        _print({"key": key, "ok": report.ok, **named, "notes": report.notes})
    elif report.ok:
        click.echo(f"{key}: exactly what its manifest says")
    else:
        for kind, names in named.items():
            for name in names[:_SHOWN]:
                click.echo(f"{kind.replace('_', ' ')}: {name}")
            if len(names) > _SHOWN:
                click.echo(f"{kind.replace('_', ' ')}: and {len(names) - _SHOWN:,} more (--json)")
        for note in report.notes:
            click.echo(note)
    sys.exit(0 if report.ok else 3)


@datasets.command()
@click.argument("before", metavar="KEY")
@click.argument("after", metavar="OTHER")
@click.option("--examples", type=click.IntRange(0), default=3, help="Shown of each kind.")
@_json
def diff(before: str, after: str, examples: int, as_json: bool) -> None:
    """What OTHER has that KEY has not, and the other way round.

    An example that was replaced by another with the same prompt is `changed`.
    """
    from tunix_mlflow import paths
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog import read
    from tunix_mlflow.data.examples import from_canonical

    found = operations.diff(before, after)
    if as_json:
        _print(
            {
                "added": [canonical.id_of(d) for d in found.added],
                "removed": [canonical.id_of(d) for d in found.removed],
                "changed": [[canonical.id_of(d) for d in pair] for pair in found.changed],
                "moved": [[canonical.id_of(d), was, now] for d, was, now in found.moved],
            }
        )
        return
    click.echo(
        f"{before} -> {after}: {len(found.added):,} added, {len(found.removed):,} removed,"
        f" {len(found.changed):,} changed, {len(found.moved):,} in another split"
    )
    shown = [*found.added[:examples], *found.removed[:examples]]
    shown += [d for pair in found.changed[:examples] for d in pair]
    texts = read.texts(paths.catalog_path(), shown)

    def show(sign: str, digest: str) -> None:
        click.echo(f"\n{sign} {canonical.id_of(digest)}")
        if digest in texts:
            click.echo(_readable(from_canonical(texts[digest])))

    for digest in found.added[:examples]:
        show("+", digest)
    for digest in found.removed[:examples]:
        show("-", digest)
    for old, new in found.changed[:examples]:
        show("-", old)
        show("+", new)
    for digest, was, now in found.moved[:examples]:
        click.echo(f"\n{canonical.id_of(digest)}: {was} -> {now}")


@datasets.command("check-leakage")
@click.argument("trained", metavar="KEY")
@click.argument("evaluated", metavar="EVALUATION")
@click.option("--train-split", default="train", show_default=True, help="Of KEY.")
@click.option("--split", help="Of EVALUATION; without it, all of it.")
@_json
def check_leakage(
    trained: str, evaluated: str, train_split: str, split: str | None, as_json: bool
) -> None:
    """Look for an evaluation set in a training split; exit code 3 if it is there.

    By whole prompts, and by runs of eight words: a prompt overlaps when half of its runs are
    found. Both datasets may be given by digest; then only their snapshots are read.
    """
    from tunix_mlflow.data import canonical
    from tunix_mlflow.data import datasets as operations

    def say(message: str) -> None:
        click.echo(message, err=True)

    manifests = [operations.ready(key, say) for key in (trained, evaluated)]
    found = operations.check_leakage(manifests[0], train_split, manifests[1], split)
    exact = [canonical.id_of(d) for d in found.exact]
    overlapping = [canonical.id_of(d) for d in found.overlapping]
    if as_json:
        _print(
            {"ok": found.ok, **found.figures(), "prompts": found.prompts}
            | {"exact": exact, "overlapping": overlapping}
        )
    else:
        click.echo(
            f"{len(exact):,} of {found.prompts:,} prompts are trained on, {len(overlapping):,}"
            f" overlap by half of their 8-grams or more; {found.found:,} of {found.grams:,}"
            " 8-grams found"
        )
        for kind, names in (("exact", exact), ("overlapping", overlapping)):
            for name in names[:_SHOWN]:
                click.echo(f"{kind}: {name}")
    sys.exit(0 if found.ok else 3)


@datasets.command()
@click.argument("key")
@click.option("--sequence-length", type=click.IntRange(1), help="Tokens in a row.")
@click.option("--base", help="Count tokens by the tokenizer and template of this model.")
@_json
def stats(key: str, sequence_length: int | None, base: str | None, as_json: bool) -> None:
    """Steps, characters and byte tokens of a dataset, with percentiles.

    With --sequence-length, how many examples a row of that length would cut.
    """
    if base is not None:
        _stats_of(key, base, as_json)
        return
    from tunix_mlflow import paths
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog import read

    manifest = operations.get(key)
    figures = dict(manifest.stats)
    if sequence_length is not None:
        # A row holds one token fewer than an example: the last is only ever predicted.
        cut = read.longer_than(paths.catalog_path(), key, sequence_length + 1)
        figures |= {"sequence_length": sequence_length, "cut": cut}
    if as_json:
        _print({"key": key, "count": manifest.count, **figures})
        return
    click.echo(f"{key}: {manifest.count:,} examples")
    columns = ("mean", "p50", "p90", "p99", "max")
    click.echo(f"{'':12}" + "".join(f"{c:>10}" for c in columns))
    for name in ("steps", "characters", "tokens"):
        click.echo(
            f"{name:12}" + "".join(f"{figures.pop(f'{name}_{c}', '-'):>10}" for c in columns)
        )
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")
    if sequence_length is not None and figures["cut"]:
        click.echo(
            f"warning: rows of {sequence_length} tokens would cut {figures['cut']:,} of"
            f" {manifest.count:,} examples ({figures['cut'] / manifest.count:.1%})"
        )


@datasets.command()
@click.argument("key")
@click.option("-n", "count", type=click.IntRange(1), default=3, help="How many.")
@click.option("--seed", type=int, default=0, help="Another seed draws others.")
@click.option("--split", help="From this split only.")
@_json
def sample(key: str, count: int, seed: int, split: str | None, as_json: bool) -> None:
    """Examples of a dataset, drawn at random."""
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data import examples

    manifest = operations.ready(key, lambda message: click.echo(message, err=True))
    found = operations.sample(manifest, count, seed=seed, split=split)
    if as_json:
        _print([json.loads(examples.canonical_text(e)) for e in found])
        return
    click.echo("\n\n".join(_readable(e) for e in found))


@datasets.command()
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["trace", "messages", "prompt-completion", "gemma"]),
    default="trace",
    show_default=True,
)
@_json
def export(key: str, file: Path, form: str, as_json: bool) -> None:
    """Write a dataset to FILE.jsonl, FILE.jsonl.gz or FILE.parquet.

    `ingest` reads what trace, messages and prompt-completion write; gemma is text with Gemma's
    turns.
    """
    from tunix_mlflow.data import datasets as operations

    lines = operations.export(key, file, form)
    if as_json:
        _print({"key": key, "file": str(file), "format": form, "lines": lines})
    else:
        click.echo(f"{lines} examples in {file}")


@datasets.command()
@click.option("--yes", is_flag=True, help="Do it; without, only say what would be done.")
@_json
def gc(yes: bool, as_json: bool) -> None:
    """Remove what killed processes left, and examples that no dataset has.

    Snapshots stay: runs and registered models refer to them.
    """
    import shutil

    from tunix_mlflow import paths
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data.catalog import store

    left = operations.leftovers()
    count, size = (0, 0)
    if paths.catalog_path().exists():
        count, size = store.unreferenced(paths.catalog_path(), remove=yes)
    if yes:
        for path, _ in left:
            shutil.rmtree(path, ignore_errors=True)
    total = size + sum(each for _, each in left)
    if as_json:
        found = {"leftovers": [str(path) for path, _ in left], "examples": count, "bytes": total}
        _print(found | {"removed": yes})
        return
    done = "removed" if yes else "would remove"
    click.echo(f"{done} {count:,} examples and {len(left)} leftovers, {total / 1e6:,.1f} MB")
    if not yes and (left or count):
        click.echo("--yes does it")


def _report(built: Any, as_json: bool) -> None:
    manifest = built.manifest
    if as_json:
        _print(_plain(manifest) | {"created": built.created})
        return
    what = "stored" if built.created else "identical to what is there"
    splits = ", ".join(f"{name} {split.count}" for name, split in manifest.splits.items())
    click.echo(f"{manifest.key}: {manifest.count} examples ({splits}), {what}")
    click.echo(f"digest {manifest.digest}")


def _filters(where: tuple[str, ...]) -> dict[str, Any]:
    from tunix_mlflow.errors import DatasetError

    filters: dict[str, Any] = {}
    for text in where:
        match = re.fullmatch(r"(.*?)(!=|!:|>=|<=|=|>|<|:)(.*)", text, re.DOTALL)
        if match is None:
            raise DatasetError(f"--where {text!r}: expected KEY=VALUE, or !=, <, <=, >, >=, :, !:")
        key, symbol, rest = match.groups()
        values = [_value(part) for part in rest.split(",")] if ":" in symbol else _value(rest)
        asked = filters.setdefault(key, {})
        if _OPERATORS[symbol] in asked:
            raise DatasetError(f"--where {text!r}: {key}{symbol} is given twice")
        asked[_OPERATORS[symbol]] = values
    # The short form of equality is the manifest's.
    return {k: v["eq"] if list(v) == ["eq"] else v for k, v in filters.items()}


def _value(text: str) -> Any:
    from tunix_mlflow.data import canonical

    try:
        return canonical.decode(text)
    except ValueError:
        return text


def _shares(words: tuple[str, ...]) -> dict[str, float]:
    from tunix_mlflow.errors import DatasetError

    shares: dict[str, float] = {}
    for name, text in _pairs(words, "--split"):
        try:
            shares[name] = float(text)
        except ValueError:
            raise DatasetError(f"--split {name}={text}: expected NAME=SHARE, 0 to 1") from None
    return shares


def _pairs(words: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    from tunix_mlflow.errors import DatasetError

    found = [word.partition("=") for word in words]
    for word, (key, equals, _) in zip(words, found, strict=True):
        if not equals or not key:
            raise DatasetError(f"{option} {word!r}: expected KEY=VALUE")
    return [(key, value) for key, _, value in found]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes read on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with click.progressbar(length=100, label="reading", file=sys.stderr) as bar:
        yield lambda done, total: bar.update(100 * done // max(total, 1) - bar.pos)


def _readable(example: Example) -> str:
    lines = [f"{m.role}: {m.content}" for m in example.messages]
    lines += [f"  {step.i}. ({step.type}) {step.content}" for step in example.steps]
    if example.answer is not None:
        lines.append(f"answer: {example.answer}")
    if example.meta:
        lines.append(f"meta: {json.dumps(example.meta, sort_keys=True)}")
    return "\n".join(lines)


def _tokenizer(base: str | None) -> Tokenizer:
    """That of a pretrained model, or the byte tokenizer."""
    from tunix_mlflow.text.byte_tokenizer import ByteTokenizer

    if base is None:
        return ByteTokenizer()
    from tunix_mlflow.models.hub import base as bases
    from tunix_mlflow.tracking import artifacts

    with artifacts.local(base) as place:
        return bases.find(place).tokenizer


def _stats_of(key: str, base: str, as_json: bool) -> None:
    """Token lengths under a pretrained model's tokenizer."""
    from tunix_mlflow.data import datasets as operations
    from tunix_mlflow.data import snapshot
    from tunix_mlflow.input import tokens

    manifest = operations.ready(key, lambda message: click.echo(message, err=True))
    examples = snapshot.read(manifest.digest)
    figures = tokens.statistics(tokens.encode_examples(examples, _tokenizer(base), True))
    if as_json:
        _print({"key": key, "count": manifest.count, "base": base, **figures})
        return
    click.echo(f"{key}: {manifest.count:,} examples")
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):12} {value:>12,.10g}")


def _masked(example: Example, answer_only: bool, tokenizer: Tokenizer) -> str:
    from itertools import groupby

    ids, trained = tokenizer.encode_example(example, include_steps=not answer_only)
    lines = []
    for is_trained, part in groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1])):
        tokens = [int(token) for token, _ in part]
        kind = "trained" if is_trained else "ignored"
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        lines.append(f"{kind} {len(tokens):>4} tokens  {text!r}")
    return "\n".join(lines)


def _plain(manifest: Manifest) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return plain


def _print(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))
