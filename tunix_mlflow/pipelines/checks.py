"""What is checked of a dataset before a run on it begins."""

from __future__ import annotations

from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import Refused
from tunix_mlflow.runtime.report import Reporter
from tunix_mlflow.text import fidelity
from tunix_mlflow.training.inputs import TrainingInputs

_REMEDIES = {
    fidelity.CONTENT: "data.turns=last or expand, and data.reasoning=inline, render otherwise",
    fidelity.THOUGHT: "data.turns=last or expand, and data.reasoning=inline, render otherwise",
    fidelity.END: "data.end=append adds the tokenizer's end token",
    fidelity.CALL: "the template has no place for calls: give the base another one",
    fidelity.ARGUMENT: "the template has no place for calls: give the base another one",
    fidelity.UNKNOWN: "the base needs another tokenizer",
}


def check_fidelity(inputs: TrainingInputs, reporter: Reporter) -> dict[str, float]:
    """Say what the tokens lack of what the examples say; return counts for the run's tags.

    Raises:
        Refused: if a text is missing from a turn that is trained on, or nothing ends the turn,
            unless data.fidelity is record.
    """
    if (reason := reason_to_refuse(inputs)) is not None:
        raise Refused(reason)
    figures: dict[str, float] = {}
    for loss, line in inputs.losses:
        kind = f"fidelity.{loss.kind.replace(' ', '_')}" + (".trained" if loss.refuses else "")
        figures[kind] = figures.get(kind, 0) + loss.examples
        reporter.info(f"warning: {line}")
    return figures


def reason_to_refuse(inputs: TrainingInputs) -> str | None:
    """Return what is missing from turns that are trained on, with remedies; None: nothing is."""
    missing = [(loss.kind, line) for loss, line in inputs.losses if loss.refuses]
    if not missing or inputs.config.data.fidelity == "record":
        return None
    key = inputs.manifest.key
    remedies = dict.fromkeys(_REMEDIES[kind] for kind, _ in missing)
    return (
        f"dataset {key}: {'; '.join(line for _, line in missing)}. See `tunix-mlflow datasets show"
        f" {key} --mask --base MODEL`; {'; '.join(remedies)}; data.fidelity=record trains anyway"
    )


def check_leakage(config: Config, manifest: Manifest, reporter: Reporter) -> dict[str, float]:
    """Look for evaluation prompts in the training split; return figures for the run's tags.

    The dataset's own splits share no prompt with each other by construction, and their 8-grams are
    recorded only: the questions of one template share them.

    Raises:
        Refused: if a dataset of data.evaluation_sets leaks, unless data.leakage is record.
    """
    figures: dict[str, float] = {}
    train = config.data.train_split
    if config.evaluation.split in manifest.splits:
        leakage = datasets.check_leakage(manifest, train, manifest, config.evaluation.split)
        figures |= leakage.figures()
    for key in config.data.evaluation_sets:
        evaluated = datasets.ready(key, reporter.info)
        leakage = datasets.check_leakage(manifest, train, evaluated, None)
        figures |= {f"{name}.{evaluated.key}": value for name, value in leakage.figures().items()}
        if not leakage.ok:
            message = (
                f"{evaluated.key} leaks into {manifest.key}/{train}: {len(leakage.exact)} prompts"
                f" are trained on, {len(leakage.overlapping)} overlap by 8-grams"
            )
            if config.data.leakage == "refuse":
                raise Refused(
                    f"{message}. See `tunix-mlflow datasets check-leakage {manifest.key}"
                    f" {evaluated.key}`, or set data.leakage=record"
                )
            reporter.info(f"{message}: recorded on the run")
    return figures
