"""`tunix-mlflow models`: what a pretrained model is and needs, and trained ones for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """Look at pretrained models, and hand trained ones on."""


@models.command()
@click.argument("place")
@click.option("--length", type=click.IntRange(16), default=2048, show_default=True, help="Tokens.")
@_json
def inspect(place: str, length: int, as_json: bool) -> None:
    """Show a model's shape and tokenizer, and what fine-tuning it takes.

    PLACE is a folder as Hugging Face lays it out, a hub cache's, a GGUF file, or runs:/ or
    models:/ of MLflow's. No weight is read.
    """
    from tunix_mlflow.models.hub import base as bases
    from tunix_mlflow.tracking import artifacts
    from tunix_mlflow.training import memory

    with artifacts.local(place) as path:
        found = bases.find(path)
    needs = memory.table(found.config, found.config.vocab_size or 0, length)
    about = bases.describe(found)
    if as_json:
        ways = {way: need._asdict() | {"total": need.total} for way, need in needs.items()}
        click.echo(json.dumps(about | {"length": length, "bytes": ways}))
        return
    for key, value in about.items():
        click.echo(f"{key:<12} {value}")
    click.echo(f"\nGB on one GPU, one row of {length} tokens at a time, blocks computed again:")
    click.echo(f"{'':<24} {'needs':>8}  {'  '.join(memory.CARDS)}")
    for way, need in needs.items():
        fits = "  ".join(
            f"{'fits' if need.total <= memory.FREE * size else 'no':>{len(card)}}"
            for card, size in memory.CARDS.items()
        )
        click.echo(f"{way:<24} {need.total / 1e9:>8.1f}  {fits}")


@models.command("import")
@click.argument("place")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="The default length of its completions.",
)
@_json
def import_(place: str, max_new_tokens: int, as_json: bool) -> None:
    """Log a pretrained model as it is, so that it can be evaluated and compared.

    PLACE is as for inspect.
    """
    from tunix_mlflow.config.schema import Config
    from tunix_mlflow.runtime.environment import prepare

    config = Config(base=place)
    prepare(config)
    from tunix_mlflow.pipelines import import_model

    done = import_model.log(config, max_new_tokens)
    said = done._asdict()
    click.echo(
        json.dumps(said) if as_json else f"{done.model_id} of run {done.run_id}: {done.link}"
    )


@models.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--adapter", is_flag=True, help="The adapter alone, as PEFT reads it.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
@_json
def export(model: str, folder: Path, adapter: bool, dtype: str, as_json: bool) -> None:
    """Write a logged model as a new FOLDER that transformers reads, adapters merged.

    MODEL is a run id, a model id or a models:/ URI.
    """
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.models.hub import export, pretrained
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.models import flavor, registry

    pretrained.require_absent(folder)  # before a model is fetched
    client = store.connect(TrackingConfig())
    logged = registry.resolve(client, model)
    bundle = flavor.load_model(f"models:/{logged.model_id}")
    write = export.adapter if adapter else export.merged
    write(bundle, folder, dtype)
    said: dict[str, Any] = {"model_id": logged.model_id, "folder": str(folder)}
    click.echo(json.dumps(said) if as_json else f"{logged.model_id} is in {folder}")
