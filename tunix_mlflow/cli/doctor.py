"""`tunix-mlflow doctor`: check what a run needs, before it begins."""

from __future__ import annotations

import click

from tunix_mlflow.errors import UnavailableError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check what runs need: stores, registry, clock, device, memory, disk, versions.

    A run, an artifact and a registered model are made where MLFLOW_TRACKING_URI says, and deleted
    again. Exit code 4 if a check fails.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_json
    from tunix_mlflow.pipelines import doctor as pipeline

    with Terminal() as reporter:
        found = pipeline.examine(reporter=reporter)
    if as_json:
        print_json([finding._asdict() for finding in found])
    if failed := [finding.name for finding in found if not finding.ok]:
        raise UnavailableError(f"failed: {', '.join(failed)}")
