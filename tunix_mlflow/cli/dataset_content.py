"""`tunix-mlflow datasets show`, `sample` and `stats`: what a dataset contains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tunix_mlflow.cli.arguments import ConfigurableCommand, Number

if TYPE_CHECKING:
    from tunix_mlflow.config.schema import DataConfig
    from tunix_mlflow.data.examples import Example
    from tunix_mlflow.text.tokenizer import Tokenizer

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_STATISTICS = ("mean", "p50", "p90", "p99", "max")


@click.command(cls=ConfigurableCommand)
@click.argument("key")
@click.option(
    "--limit",
    type=Number(1),
    default=3,
    show_default=True,
    help="Examples to show.",
)
@click.option("--mask", is_flag=True, help="Show the tokens, and which are trained on.")
@click.option("--base", help="With --mask: use the tokenizer and template of this model.")
@_json
def show(
    key: str, limit: int, mask: bool, base: str | None, as_json: bool, overrides: dict[str, str]
) -> None:
    """Show a dataset's manifest, statistics and first examples.

    With --mask, keys of `data` say how they are rendered, such as data.turns=last.
    """
    import msgspec

    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.data import datasets, snapshot
    from tunix_mlflow.data.examples import canonical_text

    config = _data(overrides, "--mask" if not mask else None)
    manifest = datasets.ready(key, Terminal().info)
    examples = snapshot.read(manifest.digest)[:limit]
    if as_json:
        texts = [json.loads(canonical_text(example)) for example in examples]
        print_json(msgspec.to_builtins(manifest) | {"examples": texts})
        return
    click.echo(f"{manifest.key}: {manifest.count} examples, digest {manifest.digest}")
    for name, split in manifest.splits.items():
        click.echo(f"  split {name}: {split.count} examples, digest {split.digest}")
    for name, value in {**manifest.stats, **manifest.request}.items():
        click.echo(f"  {name}: {_printable(str(value))}")
    if manifest.parent is not None:
        click.echo(f"  parent: {manifest.parent}")
    for source in datasets.provenance(key):
        file = _printable(str(source["file"]))
        if "origin" in source:
            file += f" of {_printable(str(source['origin']))}"
        click.echo(f"  from {file}: {source['rows']} rows, sha256 {source['sha256']}")
    tokenizer = _tokenizer(base) if mask else None
    for example in examples:
        text = readable(example) if tokenizer is None else masked(example, config, tokenizer)
        click.echo(f"\n{text}")


@click.command()
@click.argument("key")
@click.option(
    "-n",
    "count",
    type=Number(1),
    default=3,
    show_default=True,
    help="How many.",
)
@click.option("--seed", type=Number(0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--split", help="Draw from this split only.")
@_json
def sample(key: str, count: int, seed: int, split: str | None, as_json: bool) -> None:
    """Show examples of a dataset, drawn at random."""
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.data import datasets
    from tunix_mlflow.data.examples import canonical_text

    manifest = datasets.ready(key, Terminal().info)
    examples = datasets.sample(manifest, count, seed=seed, split=split)
    if as_json:
        print_json([json.loads(canonical_text(example)) for example in examples])
    else:
        click.echo("\n\n".join(readable(example) for example in examples))


@click.command(cls=ConfigurableCommand)
@click.argument("key")
@click.option("--sequence-length", type=Number(1), help="Tokens in a row.")
@click.option("--base", help="Count tokens with the tokenizer and template of this model.")
@_json
def stats(
    key: str,
    sequence_length: int | None,
    base: str | None,
    as_json: bool,
    overrides: dict[str, str],
) -> None:
    """Show steps and characters of a dataset, or its tokens, with percentiles.

    With --sequence-length, also how many examples are longer than a row of that length, in tokens
    of --base or, without it, in bytes and markers. Keys of `data` say how examples are rendered,
    such as data.turns=last.
    """
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.data import datasets

    counts_tokens = base is not None or sequence_length is not None
    config = _data(overrides, None if counts_tokens else "--base or --sequence-length")
    if counts_tokens:
        count, figures = _token_statistics(key, base, sequence_length, config)
    else:
        manifest = datasets.get(key)
        count, figures = manifest.count, dict(manifest.stats)
    if as_json:
        print_json({"key": key, "count": count, **({"base": base} if base else {}), **figures})
        return
    click.echo(f"{key}: {count:,} examples\n")
    lines = figures.pop("missing", [])
    _echo_statistics(figures)
    for line in lines:
        click.echo(f"\nwarning: {_printable(line)}")
    if figures.get("cut"):
        click.echo(
            f"\nwarning: rows of {sequence_length} tokens would cut {figures['cut']:,} of"
            f" {count:,} examples ({figures['cut'] / count:.1%})"
        )


def _echo_statistics(figures: Mapping[str, Any]) -> None:
    """Print NAME_mean, NAME_p50, ... as a table, and all other figures below it."""
    from tunix_mlflow.cli import table

    names = [key.removesuffix("_max") for key in figures if key.endswith("_max")]
    rows = [
        (name, *(figures.get(f"{name}_{statistic}") for statistic in _STATISTICS)) for name in names
    ]
    table.echo(("", *(statistic.upper() for statistic in _STATISTICS)), rows)
    shown = {f"{name}_{statistic}" for name in names for statistic in _STATISTICS}
    others = [(k.replace("_", " "), v) for k, v in figures.items() if k not in shown]
    click.echo("")
    table.echo(("FIGURE", "VALUE"), others)


def _token_statistics(
    key: str, base: str | None, sequence_length: int | None, config: DataConfig
) -> tuple[int, dict[str, Any]]:
    """Count the tokens of a dataset's examples, and those that a row would cut."""
    from tunix_mlflow.cli.terminal import Terminal
    from tunix_mlflow.data import datasets, snapshot
    from tunix_mlflow.data.examples import example_id
    from tunix_mlflow.input import tokens

    manifest = datasets.ready(key, Terminal().info)
    examples = snapshot.read(manifest.digest)
    tokenized = tokens.encode_examples(examples, _tokenizer(base), config)
    figures: dict[str, Any] = tokens.statistics(tokenized)
    if sequence_length is not None:
        # A row has one token fewer than an example: the last is only ever predicted.
        cut = int((tokenized.lengths - 1 > sequence_length).sum())
        figures |= {"sequence_length": sequence_length, "cut": cut}
    figures["missing"] = [
        tokens.describe_loss(loss, len(examples), example_id(examples[loss.first_example]))
        for loss in tokenized.losses
    ]
    return tokenized.count, figures


def readable(example: Example) -> str:
    """Return an example as lines for people, control characters escaped."""
    lines = [f"tools: {example.tools}"] if example.tools is not None else []
    for message in example.messages:
        lines.append(f"{message.role}: {message.text}")
        if message.reasoning is not None:
            lines.append(f"  reasoning: {message.reasoning}")
        if message.tool_calls is not None:
            lines.append(f"  calls: {message.tool_calls}")
    lines += [f"  {step.i}. ({step.type}) {step.content}" for step in example.steps]
    if example.answer is not None:
        lines.append(f"answer: {example.answer}")
    lines += [f"rejected: {message.text}" for message in example.rejected]
    if example.label is not None:
        lines.append(f"label: {json.dumps(example.label)}")
    if example.meta:
        lines.append(f"meta: {json.dumps(example.meta, sort_keys=True)}")
    return "\n".join(_printable(line) for text in lines for line in text.split("\n"))


def masked(example: Example, config: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the parts of an example that are trained on and ignored, one a line.

    With data.turns=expand an example is several, with an empty line between them.
    """
    from tunix_mlflow.data.examples import select_turns
    from tunix_mlflow.errors import DatasetError, ModelError

    parts = []
    for part in select_turns(example, config.turns):
        try:
            parts.append(_masked(part, config, tokenizer))
        except (DatasetError, ModelError) as error:
            parts.append(f"{readable(part)}\nwarning: {_printable(str(error))}")
    return "\n\n".join(parts)


def _masked(example: Example, config: DataConfig, tokenizer: Tokenizer) -> str:
    from itertools import groupby

    from tunix_mlflow.text import fidelity

    ids, trained, findings = tokenizer.encode_example(example, config)
    lines = []
    for is_trained, part in groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1])):
        tokens: Sequence[int] = [int(token) for token, _ in part]
        kind = "trained" if is_trained else "ignored"
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        lines.append(f"{kind} {len(tokens):>4} tokens  {text!r}")
    for finding in findings:
        where = f" (message {finding.turn})" if finding.turn else ""
        quoted = f": {finding.text!r}" if finding.text else ""
        lines.append(f"warning: {fidelity.KINDS[finding.kind]}{where}{quoted}")
    return "\n".join(lines)


def _data(overrides: Mapping[str, str], missing: str | None) -> DataConfig:
    """Return the keys of `data` that a command was given.

    Args:
        overrides: the keys.
        missing: the option without which they are of no use; None: it is there.

    Raises:
        ConfigError: for a key that does not decide how examples are rendered, a wrong value, or if
            the option is missing.
    """
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.config.schema import RENDERING
    from tunix_mlflow.errors import ConfigError

    known = [f"data.{key}" for key in RENDERING]
    if other := next((key for key in overrides if key not in known), None):
        raise ConfigError(f"{other} is not read here; expected one of {', '.join(known)}")
    if overrides and missing:
        raise ConfigError(f"{next(iter(overrides))} is read with {missing} only")
    return load_config(None, overrides).data


def _tokenizer(base: str | None) -> Tokenizer:
    """Return a pretrained model's tokenizer, or the byte tokenizer."""
    from tunix_mlflow.text.byte_tokenizer import ByteTokenizer

    if base is None:
        return ByteTokenizer()
    from tunix_mlflow.models.hub import base as bases
    from tunix_mlflow.tracking import artifacts

    with artifacts.local(base) as folder:
        return bases.find(folder).tokenizer


def _printable(text: str) -> str:
    from tunix_mlflow.runtime.report import printable

    return printable(text)
