"""Train a model: verify the dataset, check the memory, train, log the model.

From scratch, from a pretrained base, or from a checkpoint of a run; see `pipelines/resume.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.config.identity import config_digest, to_json
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data import datasets
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import CheckpointError, ConfigError, UnavailableError
from tunix_mlflow.evaluation import scoring
from tunix_mlflow.input.batches import eval_batches
from tunix_mlflow.models import arrays, decoder
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models.hub.base import Base
from tunix_mlflow.paths import run_dir
from tunix_mlflow.pipelines import checks, notes
from tunix_mlflow.pipelines.names import model_name
from tunix_mlflow.pipelines.params import training_params
from tunix_mlflow.pipelines.resume import ResumePoint
from tunix_mlflow.runtime import devices, environment
from tunix_mlflow.runtime.report import SILENT, Reporter
from tunix_mlflow.tracking import artifacts, store
from tunix_mlflow.tracking.plugins.dataset import TunixMlflowDataset
from tunix_mlflow.tracking.run import Run, open_run
from tunix_mlflow.tracking.runs import lookup
from tunix_mlflow.tracking.runs import resume as resuming
from tunix_mlflow.training import callbacks
from tunix_mlflow.training.checkpoint import Checkpoints, Retention
from tunix_mlflow.training.inputs import TrainingInputs, read_inputs
from tunix_mlflow.training.loop import Callback, Loop, fit
from tunix_mlflow.training.memory import MemoryReport, check_memory
from tunix_mlflow.training.optimizer import change_of_rate
from tunix_mlflow.training.trainer import Trainer

_SHOWN = {
    "train/loss": "loss",
    "train_perf/tokens_per_sec": "tok/s",
    "validation/loss": "validation loss",
}
"""Metrics that progress shows, and how it calls them."""


class TrainResult(NamedTuple):
    """What training returns."""

    run_id: str
    link: str
    ui: str | None  # the command that starts the UI on a local store
    model_id: str | None  # None: MLflow is away, or refuses it; `tunix-mlflow sync` logs it
    manifest: Manifest
    figures: dict[str, float]  # summary figures, validation loss and exact match


class PlanResult(NamedTuple):
    """What a training would be and need."""

    dataset: str
    rows: int
    bytes: dict[str, int]  # by kind, with their total
    available_bytes: int
    fits: bool
    refused: str | None  # why the run would be, whatever it needs


@store.restored()
def train(
    config: Config,
    *,
    resume: ResumePoint | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> TrainResult:
    """Train a model and log it to MLflow.

    Args:
        config: the run's configuration; `dataset` names the data.
        resume: the run to continue, or to fork, with `config` as `pipelines.resume` returned it.
        force: train even if the forecast says that memory is too small.
        reporter: receives messages and progress.

    Raises:
        InputError: for a dataset, device or run that cannot be used; no run is started.
        Refused: if the dataset is not what its manifest says, an evaluation set leaks, or a text
            would be lost.
        UnavailableError: if the forecast says that memory is too small, or a disk is full.
        TrainingStopped: when the loss is not finite.
    """
    environment.require(config)
    if config.evaluation.split in (config.data.train_split, config.data.validation_split):
        raise ConfigError(
            f"evaluation.split is {config.evaluation.split!r}, which training reads: nothing would"
            " be left to evaluate on"
        )
    client, _ = store.reach(config.tracking)  # one that cannot be used fails before any work
    given = artifacts.anchored(config)
    with _open_inputs(given, reporter) as (inputs, base):
        lost = checks.check_fidelity(inputs, reporter)
        leakage = checks.check_leakage(inputs.config, inputs.manifest, reporter)
        memory = check_memory(inputs.config, inputs.vocab_size, inputs.device)
        if not memory.fits and not force:
            raise UnavailableError(f"this run {memory.text()}. --force trains anyway")
        if resume is not None and (resume.fork or resume.step is not None):
            recorded = lookup.look_up(resume.run_id, reporter.info)
            resuming.need_checkpoint(recorded, resume.step, reporter.info)
        trainer = Trainer.create(
            inputs.config, inputs.vocab_size, inputs.device, base, compile_ahead=True
        )
    _report_inputs(inputs, trainer, memory, reporter)
    identity = inputs.identity(trainer.base_digest) | trainer.fingerprint()
    forked_from = _restore_fork(trainer, resume, reporter) if resume and resume.fork else None
    tags = {f"tunix_mlflow.{name}": value for name, value in identity.items()}
    tags |= {"tunix_mlflow.dataset": inputs.manifest.key}
    tags |= {"tunix_mlflow.config_digest": config_digest(inputs.config)}
    with open_run(
        stage="train",
        tracking=config.tracking,
        run_id=resume.run_id if resume and not resume.fork else None,
        name=config.tracking.run_name or f"train {inputs.manifest.key}",
        tags=tags,
        take_over=resume.take_over if resume else None,
        report=reporter.info,
    ) as run:
        reporter.info(f"run {run.run_id}: {run.link}")
        has_params = resume is not None and resume.is_recorded and not resume.fork
        params = training_params(given, inputs.config, resumed=has_params)
        _describe(run, params, inputs, trainer, leakage | lost)
        checkpoints = _open_checkpoints(run, inputs.config, identity)
        try:
            if forked_from is not None:
                run.set_tags({"tunix_mlflow.forked_from": f"{forked_from}@{trainer.updates}"})
                checkpoints.save(trainer.updates, trainer.state)  # or a kill loses where it began
                checkpoints.wait()
            elif resume is not None:
                is_fork = lookup.is_forked(
                    run.folder, client if run.is_online else None, run.run_id
                )
                _restore(run, trainer, checkpoints, resume, is_fork, reporter)
            if resume is not None and resume.before is not None:
                line = change_of_rate(
                    trainer.updates,
                    (resume.before.optimizer, resume.before.training.steps),
                    (config.optimizer, config.training.steps),
                )
                if line is not None:
                    reporter.info(line)
            if trainer.updates > config.training.steps:
                raise ConfigError(
                    f"training.steps={config.training.steps}, but step {trainer.updates} is done:"
                    " give more steps, or the step of an earlier checkpoint with --step"
                )
            reporter.info(f"if it is interrupted: tunix-mlflow resume {run.run_id}")
            fit(
                trainer,
                inputs.train_batches(),
                _callbacks(run, inputs, checkpoints, reporter),
            )
        finally:
            checkpoints.close()
        figures = _log_results(run, inputs, trainer)
    return TrainResult(
        run.run_id, run.link, store.ui_command(), run.model_id, inputs.manifest, figures
    )


def plan(config: Config, *, reporter: Reporter = SILENT) -> PlanResult:
    """Return what a run would train on and need; nothing is recorded, and no weights are read.

    Raises:
        InputError: for a dataset, device or base that cannot be used.
    """
    environment.require(config)
    with _open_inputs(config, reporter) as (inputs, _):
        memory = check_memory(inputs.config, inputs.vocab_size, inputs.device)
    refusal = checks.reason_to_refuse(inputs)
    if refusal is not None:
        reporter.info(f"training would be refused: {refusal}")
    for loss, line in inputs.losses:
        if refusal is None or not loss.refuses:
            reporter.info(f"warning: {line}")
    reporter.info(inputs.summary())
    reporter.info(f"it {memory.text()}")
    return PlanResult(
        inputs.manifest.key,
        len(inputs.train.rows),
        memory.needs._asdict() | {"total": memory.needs.total},
        memory.available_bytes,
        memory.fits,
        refusal,
    )


@contextmanager
def _open_inputs(
    config: Config, reporter: Reporter
) -> Iterator[tuple[TrainingInputs, Base | None]]:
    """What a run trains on, and the pretrained model that it begins with."""
    if config.dataset is None:
        raise ConfigError("dataset is missing; give dataset=KEY, or seed or ingest one")
    manifest = datasets.ready(config.dataset, reporter.info)
    device = devices.use(config.device, config.mesh.size)
    with artifacts.base(config) as base:
        yield read_inputs(config, manifest, device, base), base


def _report_inputs(
    inputs: TrainingInputs, trainer: Trainer, memory: MemoryReport, reporter: Reporter
) -> None:
    if not memory.fits:
        reporter.info(f"this run {memory.text()}: training anyway")
    if inputs.validation is None:
        split = inputs.config.data.validation_split
        reporter.info(f"no examples in split {split!r}: there is no validation loss")
    count = decoder.parameter_count(trainer.state.params)
    reporter.info(f"{inputs.summary()}; {count:,} parameters trained on {inputs.device}")


def _describe(
    run: Run,
    params: dict[str, Any],
    inputs: TrainingInputs,
    trainer: Trainer,
    checked: dict[str, float],
) -> None:
    """Record what is known before the first update."""
    config, manifest = inputs.config, inputs.manifest
    # First, so that a run with a configuration has them.
    run.log_params(params | {"parameters": decoder.parameter_count(trainer.state.params)})
    run.write_file("config.json", to_json(config))
    run.write_file("environment.json", json.dumps(environment.to_record()).encode())
    facts = {
        "fill": inputs.train.fill,
        "truncated": inputs.train.truncated,
        "dropped": inputs.train.dropped,
        "left_out": inputs.train.empty,
        **checked,
    }
    run.set_tags({f"tunix_mlflow.{name}": f"{value:.6g}" for name, value in facts.items()})
    run.log_input(TunixMlflowDataset(manifest, config.data.train_split), context="training")
    if inputs.validation is not None:
        split = config.data.validation_split
        run.log_input(TunixMlflowDataset(manifest, split), context="validation")
    run.set_note(notes.training(config, manifest, run.run_id, run.link))


def _callbacks(
    run: Run, inputs: TrainingInputs, checkpoints: Checkpoints, reporter: Reporter
) -> list[Callback]:
    """What acts around the updates, in the order that `loop.fit` states."""
    training = inputs.config.training
    save = callbacks.Save(checkpoints, training)
    acting: list[Callback] = [callbacks.Log([run]), _Progress(reporter)]
    if inputs.validation is not None:
        rows = inputs.validation
        acting.append(
            callbacks.Evaluate(
                lambda: eval_batches(rows, training.batch_size), training.eval_every_steps
            )
        )
    return [*acting, save, callbacks.Stop(save)]


class _Progress(Callback):
    """Report loss, validation loss and tokens a second."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._last = reporter, 0

    def on_start(self, loop: Loop) -> None:
        self._last = loop.last
        self._reporter.progress("train", loop.first, loop.last, {})

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {name: metrics[key] for key, name in _SHOWN.items() if key in metrics}
        self._reporter.progress("train", step, self._last, figures)


def _open_checkpoints(run: Run, config: Config, identity: dict[str, str]) -> Checkpoints:
    """The run's checkpoints, uploaded when they are sealed if so configured."""
    upload = config.checkpoints.upload

    def on_sealed(folder: Path, _: int) -> None:
        if upload:
            run.log_artifact(run.folder / "metrics.jsonl")  # so that another machine can resume
            run.log_artifacts(folder, f"checkpoints/{folder.name}")

    def on_removed(step: int) -> None:
        if upload:
            run.delete_artifact(f"checkpoints/{step:08d}")

    return Checkpoints(
        run.folder / "checkpoints",
        identity,
        retention=Retention.of(config.checkpoints),
        on_sealed=on_sealed,
        on_removed=on_removed,
    )


def _restore(
    run: Run,
    trainer: Trainer,
    checkpoints: Checkpoints,
    point: ResumePoint,
    is_fork: bool,
    reporter: Reporter,
) -> None:
    """Give the trainer the state to resume from.

    Raises:
        CheckpointError: if there is no checkpoint of that step, or a fork has none of its own.
    """
    if point.step is not None:
        checkpoints.rewind(point.step)
    restored = checkpoints.restore_latest(trainer.state, reporter.info)
    if restored is None:
        if is_fork:
            raise CheckpointError(
                f"run {run.run_id} died before it had a checkpoint of its own; fork again"
            )
        reporter.info(f"run {run.run_id} has no checkpoint: starting at step 0 again")
        return
    step, trainer.state = restored
    reporter.info(f"resuming run {run.run_id} after step {step}")
    before = arrays.content(checkpoints.folder / f"{step:08d}")["identity"]
    changed = [
        f"{name} {before[name]}, now {value}"
        for name, value in trainer.fingerprint().items()
        if before.get(name, value) != value
    ]
    if changed:
        reporter.info(f"another environment ({'; '.join(changed)}): the bits may differ from here")
        text = f"after step {step}: {'; '.join(changed)}"
        run.set_tags({"tunix_mlflow.environment_changed": text})


def _restore_fork(trainer: Trainer, point: ResumePoint, reporter: Reporter) -> str:
    """Give the trainer the state of another run to begin with; return that run's id.

    Raises:
        CheckpointError: if it has no such checkpoint.
    """
    folder = run_dir(point.run_id) / "checkpoints"
    checkpoints = Checkpoints(folder, {}, retention=Retention(1))
    try:
        if point.step is not None:
            trainer.state = checkpoints.restore(point.step, trainer.state)
        else:
            latest = checkpoints.restore_latest(trainer.state, reporter.info)
            if latest is None:
                raise CheckpointError(f"run {point.run_id} has no checkpoint to begin from")
            trainer.state = latest[1]
    finally:
        checkpoints.close()
    reporter.info(f"beginning at step {trainer.updates} of run {point.run_id}")
    return point.run_id


def _log_results(run: Run, inputs: TrainingInputs, trainer: Trainer) -> dict[str, float]:
    """Log samples, summary figures and the model; return the figures."""
    config, manifest = inputs.config, inputs.manifest
    step = config.training.steps
    bundle = _bundle(inputs, trainer)
    measured = run.last("validation/loss")
    if inputs.samples:
        scores = scoring.score(inputs.samples, bundle.complete, config.evaluation.batch_size)
        measured["validation/exact_match"] = scoring.exact_match(scores).value
        run.log_metrics({"validation/exact_match": measured["validation/exact_match"]}, step)
        run.log_table(scoring.table(scores), f"generations/step-{step:08d}.json")
    summary: dict[str, float] = run.log_summary(step)
    folder, digest = _save_bundle(run.folder / "models", step, bundle)
    validation = config.data.validation_split if inputs.validation is not None else None
    run.log_model(
        folder,
        name=model_name(config, manifest.key, step),
        step=step,
        prompts=inputs.prompts,
        tags={
            "tunix_mlflow.weights_digest": digest,
            "tunix_mlflow.dataset": manifest.key,
            "tunix_mlflow.dataset_digest": manifest.digest,
        },
        metrics=measured,
        dataset=TunixMlflowDataset(manifest, validation) if validation else None,
    )
    run.set_tags({"tunix_mlflow.weights_digest": digest})
    run.sync()
    return summary | measured


def _bundle(inputs: TrainingInputs, trainer: Trainer) -> bundles.Bundle:
    """The trained model, ready to generate; the trainer cannot train afterwards."""
    config, adapter = inputs.config, None
    params = trainer.merged_params()
    if trainer.frozen is not None:
        adapter = bundles.Adapter(
            config.lora, trainer.state.params, config.base or "", trainer.base_digest or ""
        )
    return bundles.Bundle(
        config=config.model,
        graph=trainer.graph,
        params=params,
        tokenizer=inputs.tokenizer,
        max_new_tokens=inputs.max_new_tokens,
        adapter=adapter,
        data=config.data,
        forms=inputs.forms,
    )


def _save_bundle(parent: Path, step: int, bundle: bundles.Bundle) -> tuple[Path, str]:
    """Write the bundle below the run's folder, unless it is there; return it and its digest."""
    digest = bundles.weights_digest(bundle.params)
    folder = parent / f"{step:08d}-{digest[:12]}"
    if not (folder / arrays.MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill
        bundles.save(bundle, folder)
    return folder, digest
