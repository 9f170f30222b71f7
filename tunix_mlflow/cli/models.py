"""`tunix-mlflow models`: inspect and import pretrained models, export trained ones."""

from __future__ import annotations

from pathlib import Path

import click

from tunix_mlflow.cli.arguments import Number

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """Inspect and import pretrained models; export trained ones."""


@models.command()
@click.argument("path")
@click.option(
    "--length",
    type=Number(16),
    default=2048,
    show_default=True,
    help="Tokens in a row.",
)
@_json
def inspect(path: str, length: int, as_json: bool) -> None:
    """Show a model's shape and tokenizer, and the memory that fine-tuning needs.

    PATH is a folder in Hugging Face's layout, a folder of its hub cache, a GGUF file, or a runs:/
    or models:/ URI of MLflow. No weights are read.
    """
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import print_json
    from tunix_mlflow.models.hub import base as bases
    from tunix_mlflow.tracking import artifacts
    from tunix_mlflow.training import memory

    with artifacts.local(path) as folder:
        base = bases.find(folder)
    needs = memory.finetuning_table(base.config, base.config.vocab_size or 0, length)
    about = bases.describe(base)
    if as_json:
        methods = {name: need._asdict() | {"total": need.total} for name, need in needs.items()}
        print_json(about | {"length": length, "bytes": methods})
        return
    table.echo(("PROPERTY", "VALUE"), [(key, str(value)) for key, value in about.items()])
    click.echo(f"\nGB on one GPU, one row of {length} tokens at a time, with rematerialization:\n")
    table.echo(
        ("FINE-TUNING", "GB", *memory.CARDS),
        [
            (
                *(name, round(need.total / 1e9, 1)),
                *(
                    "fits" if need.total <= memory.USABLE * size else "no"
                    for size in memory.CARDS.values()
                ),
            )
            for name, need in needs.items()
        ],
    )


@models.command("import")
@click.argument("path")
@click.option(
    "--max-new-tokens",
    type=Number(1),
    default=128,
    show_default=True,
    help="The default length of its completions.",
)
@_json
def import_(path: str, max_new_tokens: int, as_json: bool) -> None:
    """Log a pretrained model as it is, so that it can be evaluated and compared.

    PATH is as for inspect.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.config.schema import Config
    from tunix_mlflow.runtime.environment import export

    config = Config(base=path)
    export(config)
    from tunix_mlflow.pipelines.import_model import import_model

    with Terminal() as reporter:
        result = import_model(path, max_new_tokens=max_new_tokens, config=config, reporter=reporter)
    if as_json:
        print_json(result._asdict())
    else:
        click.echo(f"model {result.model_id} of run {result.run_id}: {result.link}")


@models.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--adapter", is_flag=True, help="Only the LoRA adapter, in PEFT's format.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights.",
)
@_json
def export(model: str, folder: Path, adapter: bool, dtype: str, as_json: bool) -> None:
    """Write a logged model as a new FOLDER that transformers reads, adapters merged.

    MODEL is a run id, a model id or a models:/ URI.
    """
    from tunix_mlflow.cli.terminal import print_json
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
    if as_json:
        print_json({"model_id": logged.model_id, "folder": str(folder)})
    else:
        click.echo(f"wrote model {logged.model_id} to {folder}")
        if not bundle.tokenizer.files:
            click.echo("it has no tokenizer for transformers: its tokens are bytes and markers")
