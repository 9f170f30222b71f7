"""`tunix-mlflow bench`: measure this machine, and compare benchmark runs."""

from __future__ import annotations

from typing import Any

import click

from tunix_mlflow.cli.arguments import ConfigurableCommand
from tunix_mlflow.errors import Refused, TrackingError

SUITES = ("train", "data", "peers", "tracking", "checkpoint", "startup", "scale")
_PRESETS = {"train": "column-addition"}  # by default; shape-s for the other suites


class _RunByDefault(click.Group):
    """A group whose command `run` is meant where none is named."""

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
            fraction = float(str(value).removesuffix("%")) / 100
        except ValueError:
            fraction = -1.0
        if not 0 <= fraction < 1:
            self.fail(f"expected a percentage such as 5%, got {value!r}", param, ctx)
        return fraction


@click.group(cls=_RunByDefault)
def bench() -> None:
    """Measure this machine: the training step and what surrounds it; compare runs.

    `tunix-mlflow bench [CONFIG] [KEY=VALUE]...` is short for `bench run`.
    """


@bench.command(cls=ConfigurableCommand)
@click.argument("config", required=False)
@click.option("--suite", type=click.Choice(SUITES), help="What to measure.  [default: train]")
def run(config: str | None, suite: str | None, overrides: dict[str, Any]) -> None:
    """Measure, and record it as a run; the last line is JSON.

    Without CONFIG, the suite train measures the preset column-addition, and the others shape-s. The
    suite peers needs `make peers` once.
    """
    from tunix_mlflow.cli.terminal import Terminal, print_result
    from tunix_mlflow.config.load import load_config
    from tunix_mlflow.runtime.environment import export

    suite = suite or overrides.get("benchmark.suite", "train")
    loaded = load_config(
        config or _PRESETS.get(suite, "shape-s"), overrides | {"benchmark.suite": suite}
    )
    export(loaded)
    from tunix_mlflow.benchmarks import run as benchmark

    with Terminal() as reporter:
        result = benchmark.run(loaded, reporter)
    print_result(**result)


@bench.command()
@click.argument("run_id", metavar="RUN_ID")
@click.option("--baseline", required=True, help="A run id, or @NAME for a run accepted as NAME.")
@click.option(
    "--max-drop",
    type=_Percent(),
    default="5%",
    show_default=True,
    help="How much worse a median may be.",
)
@click.option("--accept", metavar="NAME", help="If no figure fell, make RUN_ID the baseline NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(run_id: str, baseline: str, max_drop: float, accept: str | None, as_json: bool) -> None:
    """Show which figures of a benchmark run fell below another run's.

    A figure fell if its median is worse by more than --max-drop and its repeats do not overlap with
    the baseline's. Exit code 3 if one did.
    """
    from tunix_mlflow.benchmarks import compare as comparison
    from tunix_mlflow.cli import table
    from tunix_mlflow.cli.terminal import print_json
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
        print_json([change._asdict() for change in changes])
    else:
        headers = ("FIGURE", "BASELINE", "RUN", "CHANGE", "NOISE", "RESULT")
        table.echo(
            headers,
            [
                (
                    *(c.name, round(c.baseline, 3), round(c.run, 3)),
                    *(f"{-c.drop:+.1%}", f"{c.noise:.1%}", "fell" if c.fell else "ok"),
                )
                for c in changes
            ],
        )
    if fallen := [c.name for c in changes if c.fell]:
        raise Refused(
            f"{', '.join(fallen)} fell by more than {100 * max_drop:g}% below run {before}"
        )
    if accept:
        comparison.accept(client, run_id, accept)
