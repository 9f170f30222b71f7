"""The whole way: seed, train, evaluate, register and promote, as one run with linked children.

    mlflow run . --env-manager local
    tunix-mlflow demo

Two cores: about a minute and a half for the preset column-addition, held-out exact match 0.95
or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunix_mlflow.cli.arguments import parse
from tunix_mlflow.config.schema import Config
from tunix_mlflow.errors import TrackingError
from tunix_mlflow.runtime import process
from tunix_mlflow.runtime.environment import prepare

from . import console
from .evaluate import evaluate
from .promote import promote
from .seed import seed
from .train import summarize, train

DEFAULT = "column-addition"


def run_all(config: Config) -> dict[str, Any]:
    """Run the stages in order, each in a child run, in this process.

    Returns:
        The figures that the demo prints.

    Raises:
        TunixError: whatever a stage raises; the parent run fails with it.
    """
    from tunix_mlflow.data import seeds
    from tunix_mlflow.tracking import store
    from tunix_mlflow.tracking.run import session

    with session(config, stage="main") as run:
        if config.dataset is not None and seeds.find(config.dataset) is not None:
            seed(config)
        trained = train(config)
        summarize(trained)
        if trained.model_id is None:
            raise TrackingError(
                f"MLflow went away, so the model of run {trained.run_id} is not logged yet: when"
                f" it is back, tunix-mlflow sync {trained.run_id}, then evaluate and promote it"
            )
        scored = evaluate(config, trained.model_id)
        promoted = promote(config, trained.model_id)
        figures = {
            "dataset": trained.manifest.key,
            "examples": trained.manifest.count,
            "steps": int(trained.figures["total_steps"]),
            "tokens_per_sec": round(trained.figures["avg_throughput"]),
            "final_loss": trained.figures["final_loss"],
            "exact_match": scored.exact_match,
            "exact_match_interval": [scored.low, scored.high],
            "model": promoted.name,
            "version": promoted.version,
            "verdict": promoted.verdict,
            "run_id": run.run_id,
            "train_run_id": trained.run_id,
            "link": store.run_link(run.experiment_id or ""),
            "ui": store.ui_command(),
        }
        run.log_figures(
            {
                "final_loss": trained.figures["final_loss"],
                "avg_throughput": trained.figures["avg_throughput"],
                "eval/exact_match": scored.exact_match,
            }
        )
    return figures


def main(argv: Sequence[str]) -> None:
    """Parse, run, print."""
    arguments = parse(argv)
    config = arguments.load(DEFAULT)
    prepare(config)
    figures = run_all(config)
    console.say("")
    console.say(f"dataset             {figures['dataset']}, {figures['examples']:,} examples")
    console.say(f"steps               {figures['steps']}")
    console.say(f"tokens/s            {figures['tokens_per_sec']:,}")
    console.say(f"final loss          {figures['final_loss']:.4f}")
    low, high = figures["exact_match_interval"]
    console.say(
        f"held-out match      {figures['exact_match']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    )
    console.say(
        f"model               {figures['model']} version {figures['version']}: {figures['verdict']}"
    )
    if figures["ui"]:
        console.say(f"look at it          {figures['ui']}")
    console.say(f"                    {figures['link']}")
    console.result(**figures)


if __name__ == "__main__":
    process.run(main)
