"""`tunix-mlflow clean`: remove what dead processes left."""

from __future__ import annotations

import click

from tunix_mlflow.errors import UnavailableError


@click.command()
@click.option("--yes", is_flag=True, help="Remove it; without it, only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clean(yes: bool, as_json: bool) -> None:
    """Remove what dead processes left, here and in MLflow.

    Runs that are RUNNING though their process is gone get a status; models that are not complete or
    there twice, checkpoints that are half there and temporary files are deleted. Nothing of a run
    that is open, and nothing that a registered version needs. Exit code 4 if something remains.
    """
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.pipelines import clean as pipeline

    with Terminal() as reporter:
        found = pipeline.clean(remove=yes, reporter=reporter)
    if as_json:
        leftovers = [leftover._asdict() for leftover in found.leftovers]
        print_json({"leftovers": leftovers, "removed": found.removed, "failed": found.failed})
    else:
        if found.leftovers:
            rows = [(o.kind, o.where, round(o.bytes / 2**20, 1), o.text) for o in found.leftovers]
            table.echo(("KIND", "WHERE", "MIB", "WHAT"), rows)
        size = sum(leftover.bytes for leftover in found.leftovers) / 2**20
        done = "removed" if yes else "would remove"
        hint = "; add --yes to do it" if found.leftovers and not yes else ""
        click.echo(f"{done} {len(found.leftovers)} leftovers, {size:,.1f} MiB{hint}")
    if found.failed:
        raise UnavailableError("; ".join(found.failed))
