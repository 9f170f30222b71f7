"""`tunix-mlflow bench`: measure this machine, and compare what was measured."""

from __future__ import annotations

import json

import click

from tunix_mlflow.cli import launch
from tunix_mlflow.errors import Refused, TrackingError

_ARGUMENTS = {"ignore_unknown_options": True, "help_option_names": ["--help"]}


class _RunsByDefault(click.Group):
    """`bench suite=data` is `bench run suite=data`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


class _Percent(click.ParamType):  # type: ignore[type-arg]
    name = "percent"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"expected a share such as 5%, got {value!r}", param, ctx)
        return share


@click.group(cls=_RunsByDefault)
def bench() -> None:
    """Measure this machine: the training step and what surrounds it; compare runs.

    `tunix-mlflow bench [CONFIG] [key=value]...` is short for `bench run`.
    """


@bench.command(context_settings=_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG] [key=value]...")
def run(arguments: tuple[str, ...]) -> None:
    """Measure, and record it as a run; the last line is JSON.

    suite=train (default), tracking, checkpoint, startup, scale, data, or peers (after
    `make peers`). Without CONFIG: column-addition for train, shape-s for the others.
    """
    launch.stage("bench", arguments)


@bench.command()
@click.argument("run_id", metavar="RUN")
@click.option("--baseline", required=True, help="A run, or @NAME for the one accepted as NAME.")
@click.option("--max-drop", type=_Percent(), default="5%", help="How much worse a median may be.")
@click.option("--accept", metavar="NAME", help="If nothing fell, make RUN the baseline NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(run_id: str, baseline: str, max_drop: float, accept: str | None, as_json: bool) -> None:
    """Say which figures of a benchmark run fell below another's.

    A figure fell when its median is worse by more than --max-drop and its repeats lie apart from
    the baseline's. Exit code 3 when one did.
    """
    from tunix_mlflow.benchmarks import compare as comparison
    from tunix_mlflow.config.schema import TrackingConfig
    from tunix_mlflow.tracking import store

    client = store.connect(TrackingConfig())
    before = comparison.resolve(client, baseline)
    changes = comparison.compare(
        comparison.repeats(client, run_id), comparison.repeats(client, before), max_drop
    )
    if not changes:
        raise TrackingError(f"runs {run_id} and {before} have no figure in common")
    if as_json:
        click.echo(json.dumps([change._asdict() for change in changes]))
    else:
        for c in changes:
            verdict = "FELL" if c.fell else "ok"
            click.echo(
                f"{c.name:24} {c.baseline:14,.1f} -> {c.run:14,.1f}  {-c.drop:+7.1%}"
                f"  (noise {c.noise:.1%})  {verdict}"
            )
    if fallen := [c.name for c in changes if c.fell]:
        raise Refused(
            f"{', '.join(fallen)} fell by more than {100 * max_drop:g}% below run {before}"
        )
    if accept:
        comparison.accept(client, run_id, accept)
