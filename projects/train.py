"""Train a decoder on a dataset, from scratch or from a checkpoint of a run.

    mlflow run . -e train --env-manager local -P dataset=golden-v2
    tunix-mlflow train column-addition training.steps=200
    tunix-mlflow train golden-v2 resume=auto tracking.key=job-17
    tunix-mlflow resume RUN_ID

Two cores: golden-v2 takes half a minute, column-addition one and a half.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tunix_mlflow import paths
from tunix_mlflow.cli.arguments import Arguments, parse
from tunix_mlflow.config.load import apply_overrides, inherit_auto
from tunix_mlflow.config.schema import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import CheckpointError, ConfigError, Refused
from tunix_mlflow.runtime import process
from tunix_mlflow.runtime.environment import prepare

from . import console

if TYPE_CHECKING:
    from tunix_mlflow.models.hub.base import Base
    from tunix_mlflow.tracking.run import RunSession
    from tunix_mlflow.training.checkpoint import Checkpoints
    from tunix_mlflow.training.setup import Inputs, Setup
    from tunix_mlflow.training.step import TrainState

OWN = ("resume", "step", "fork")
FLAGS = ("plan", "force")
DEFAULT = "golden-v2"
PRETRAINED = "pretrained"  # with a base, where no other configuration is named
AUTO = "auto"


class Start(NamedTuple):
    """Where training begins, when not at step 0 of a new run."""

    run_id: str
    step: int | None = None  # None: its newest checkpoint
    fork: bool = False  # a new run begins there


class Trained(NamedTuple):
    """What training hands on."""

    run_id: str
    link: str
    ui: str | None  # the command that opens the UI on a local store
    model_id: str | None  # None: MLflow was away, and is told later
    manifest: Manifest
    figures: dict[str, float]


def train(config: Config, *, start: Start | None = None, force: bool = False) -> Trained:
    """Verify the dataset, train, log the model.

    Args:
        config: the run's configuration.
        start: the run to go on with, or to begin at; its configuration allows `config`.
        force: train even if memory is forecast to be too small.

    Raises:
        InputError: for a dataset, device or run that cannot be used; no run is started.
        Refused: if the dataset is not what its manifest says, an evaluation set leaks, or the
            device's memory is forecast to be too small.
        TrainingStopped: when the loss is not finite.
    """
    from tunix_mlflow.evaluation import scoring
    from tunix_mlflow.models import bundle as bundles
    from tunix_mlflow.models import decoder
    from tunix_mlflow.tracking import artifacts, note, store
    from tunix_mlflow.tracking.run import session
    from tunix_mlflow.training import loop, memory
    from tunix_mlflow.training import setup as setups

    store.reach(config.tracking)  # a store that cannot be used is said before any work
    with _inputs(artifacts.anchored(config)) as (inputs, base):
        config, manifest = inputs.config, inputs.manifest
        leaks = _leakage(config, manifest)
        verdict = memory.check_memory(inputs)
        if not verdict.fits and not force:
            raise Refused(f"this run {verdict.text()}. --force trains all the same")
        compiled = setups.compile_ahead(inputs.spec, config, inputs.vocab_size, inputs.device)
        setup = setups.build(inputs, base)
    if not verdict.fits:
        console.say(f"this run {verdict.text()}: training all the same")
    count = decoder.parameter_count(setup.state.params)
    if inputs.held_out_rows is None:
        console.say(f"no examples in split {config.evaluation.split!r}: nothing is held out")
    console.say(f"{_told(inputs)}; {count:,} parameters trained on {inputs.device}")
    identity, fingerprint = setup.identity(), setup.fingerprint()
    tags = {f"tunix_mlflow.{name}": value for name, value in (identity | fingerprint).items()}
    tags |= {"tunix_mlflow.dataset": manifest.key}
    resumed = start.run_id if start and not start.fork else None
    forked = _forked(setup, start) if start and start.fork else None

    with session(config, stage="train", run_id=resumed, tags=tags) as run:
        console.say(f"run {run.run_id}: {run.link}")
        run.log_dataset(manifest, config.data.train_split, usage="training")
        if inputs.held_out:
            run.log_dataset(manifest, config.evaluation.split, usage="evaluation")
        run.log_note(note.training(config, manifest, run.run_id, run.link))
        run.write_scalars(
            0,
            {
                "data/fill": inputs.rows.fill,
                "data/truncated": inputs.rows.truncated,
                "data/dropped": inputs.rows.dropped,
                **leaks,
                "model/parameters": count,
            },
        )
        checkpoints = _checkpoints(run, setup)
        if forked is not None:
            at, state = forked
            run.set_tags({"tunix_mlflow.forked_from": f"{start.run_id if start else ''}@{at}"})
            checkpoints.save(at, state)  # else a kill would lose where it began
            checkpoints.wait()
        else:
            state = _restored(run, setup, checkpoints, start)
        progress = console.TrainingProgress(int(state.step), config.training.steps)
        try:
            console.say(f"if it is interrupted: tunix-mlflow resume {run.run_id}")
            state = loop.fit(
                config,
                state,
                setup.train_batches(),
                spec=setup.spec,
                writers=[run, progress],
                checkpoints=checkpoints,
                evaluate=setup.held_out_loss if inputs.held_out_rows is not None else None,
                frozen=setup.frozen,
                compiled=compiled,
            )
        finally:
            progress.close()
            checkpoints.close()
        last = config.training.steps
        params = setup.whole(state)
        adapter = None
        if setup.frozen is not None:
            adapter = bundles.Adapter(
                config.lora, state.params, config.base or "", setup.base_digest or ""
            )
        bundle = bundles.Bundle(
            config.model, setup.graph, params, inputs.tokenizer, inputs.max_new_tokens, adapter
        )
        sample = scoring.scorable(inputs.held_out, config.evaluation.samples)
        figures: dict[str, float] = {}
        if sample:
            judged = scoring.score(sample, bundle.complete, config.evaluation.batch_size)
            figures["eval/exact_match"] = scoring.exact_match(judged).value
            run.write_scalars(last, figures)
            run.log_table(scoring.table(judged), f"generations/step-{last:08d}.json")
        figures |= run.log_summary(last)
        weights = {"tunix_mlflow.weights_digest": bundles.weights_digest(params)}
        place = run.folder / "models" / f"{last:08d}-{weights['tunix_mlflow.weights_digest'][:12]}"
        if not (place / "manifest.json").is_file():
            shutil.rmtree(place, ignore_errors=True)  # what a kill left
            bundles.save(bundle, place)
        run.log_model(
            place,
            step=last,
            prompts=[example.prompt for example in (inputs.held_out or inputs.examples)[:3]],
            tags=weights
            | {
                name: tags[name] for name in ("tunix_mlflow.dataset", "tunix_mlflow.dataset_digest")
            },
        )
        run.set_tags(weights)
        run.sync()
        figures |= run.last("eval/loss")
    return Trained(run.run_id, run.link, store.ui_command(), run.model_id, manifest, figures)


def foresee(config: Config) -> dict[str, object]:
    """What a run would train on and need; nothing is recorded, and no weights are read.

    Raises:
        InputError: for a dataset, device or base that cannot be used.
    """
    from tunix_mlflow.training import memory

    with _inputs(config) as (inputs, _):
        verdict = memory.check_memory(inputs)
    console.say(_told(inputs))
    console.say(f"it {verdict.text()}")
    return {
        "dataset": inputs.manifest.key,
        "rows": len(inputs.rows.rows),
        "bytes": verdict.needs._asdict() | {"total": verdict.needs.total},
        "room": verdict.available_bytes,
        "fits": verdict.fits,
    }


@contextmanager
def _inputs(config: Config) -> Iterator[tuple[Inputs, Base | None]]:
    """What a run trains on, and the pretrained model that it begins with."""
    from tunix_mlflow.data import datasets
    from tunix_mlflow.runtime import devices
    from tunix_mlflow.tracking import artifacts
    from tunix_mlflow.training import setup as setups

    if config.dataset is None:
        raise ConfigError("dataset is missing; give dataset=KEY, or seed or ingest one")
    manifest = datasets.ready(config.dataset, console.say)
    with artifacts.base(config) as base:
        yield setups.read(config, manifest, devices.use(config.device), base), base


def _told(inputs: Inputs) -> str:
    return (
        f"{inputs.manifest.key}: {len(inputs.examples)} examples in {len(inputs.rows.rows)} rows"
        f" of {inputs.config.data.sequence_length} tokens ({inputs.rows.fill:.0%} full),"
        f" {len(inputs.held_out)} held out"
    )


def _checkpoints(run: RunSession, setup: Setup) -> Checkpoints:
    from tunix_mlflow.training import checkpoint

    upload = setup.config.checkpoints.upload

    def sealed(folder: Path, _: int) -> None:
        if upload:
            run.log_file(run.folder / "metrics.jsonl")  # so that another machine can go on
            run.log_folder(folder, f"checkpoints/{folder.name}")

    def removed(step: int) -> None:
        if upload:
            run.remove_artifact(f"checkpoints/{step:08d}")

    return checkpoint.Checkpoints(
        run.folder / "checkpoints",
        setup.identity() | setup.fingerprint(),
        retention=checkpoint.Retention.of(setup.config.checkpoints),
        on_sealed=sealed,
        on_removed=removed,
    )


def _restored(
    run: RunSession, setup: Setup, checkpoints: Checkpoints, start: Start | None
) -> TrainState:
    """The state to go on from."""
    if start is None:
        return setup.state
    if start.step is not None:
        checkpoints.rewind(start.step)
    restored = checkpoints.restore_latest(setup.state, run.report)
    if restored is None:
        from tunix_mlflow.tracking.runs import lookup

        reachable = run.client if run.shipper.lease is not None else None
        if lookup.forked(run.folder, reachable, run.run_id):
            raise CheckpointError(
                f"run {run.run_id} died before it had a checkpoint of its own; fork again"
            )
        console.say(f"run {run.run_id} has no checkpoint: starting at step 0 again")
        return setup.state
    step, state = restored
    console.say(f"resuming run {run.run_id} after step {step}")
    _compare_environment(run, checkpoints.folder / f"{step:08d}", setup.fingerprint())
    return state


def _forked(setup: Setup, start: Start) -> tuple[int, TrainState]:
    """Step and state of another run, for a new one to begin with.

    Raises:
        CheckpointError: if it has no such checkpoint.
    """
    from tunix_mlflow.training import checkpoint

    retention = checkpoint.Retention.of(setup.config.checkpoints)
    source = paths.run_dir(start.run_id) / "checkpoints"
    others = checkpoint.Checkpoints(source, {}, retention=retention)
    try:
        if start.step is not None:
            found = (start.step, others.restore(start.step, setup.state))
        else:
            latest = others.restore_latest(setup.state, console.say)
            if latest is None:
                raise CheckpointError(f"run {start.run_id} has no checkpoint to begin from")
            found = latest
    finally:
        others.close()
    console.say(f"beginning where run {start.run_id} was after step {found[0]}")
    return found


def _compare_environment(run: RunSession, folder: Path, now: dict[str, str]) -> None:
    """Say when this environment is not the one that a checkpoint was made in."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    before = manifest["identity"]
    other = [f"{k} {before[k]}, now {v}" for k, v in now.items() if before.get(k, v) != v]
    if other:
        console.say(f"another environment ({'; '.join(other)}): the bits may differ from here on")
        run.set_tags(
            {"tunix_mlflow.environment_changed": f"after step {manifest['step']}: {other}"}
        )


def main(argv: Sequence[str]) -> None:
    """Parse, train, print."""
    arguments = parse(argv, OWN, flags=FLAGS)
    plan, force = (arguments.stage.get(flag) == "true" for flag in FLAGS)
    resume = arguments.stage.get("resume")
    config: Config | None
    start: Start | None = None
    if "base" in arguments.overrides and arguments.config in (None, DEFAULT):
        arguments = arguments._replace(config=PRETRAINED)
    if resume is None:
        config = arguments.load(DEFAULT)
        prepare(config)
    elif resume == AUTO:
        config, start = _automatic(arguments)
    else:
        config, start = _named(arguments, resume)
    if config is None:
        return  # it has finished already
    if plan:
        console.result(**foresee(config))
        return
    trained = train(config, start=start, force=force)
    summarize(trained)
    if trained.ui:
        console.say(f"to look at it: {trained.ui}")
    console.result(
        run_id=trained.run_id,
        model_id=trained.model_id,
        dataset=trained.manifest.key,
        **trained.figures,
    )


def _named(arguments: Arguments, run_id: str) -> tuple[Config, Start]:
    """Go on with the run that the user names."""
    from tunix_mlflow.tracking.runs import lookup

    if arguments.config not in (None, DEFAULT):  # which is what MLproject hands on
        raise ConfigError("a resumed run keeps its configuration; give only key=value to change")
    fork = arguments.stage.get("fork", "false") == "true"
    text = arguments.stage.get("step")
    if text is not None and not text.isdigit():
        raise ConfigError(f"step: expected a number of updates, got {text!r}")
    found = lookup.to_resume(
        run_id, lambda before: apply_overrides(before, arguments.overrides), fork=fork
    )
    step = int(text) if text else None
    prepare(found.config, found.environment)
    if fork or step is not None:
        lookup.need_checkpoint(found, step, console.say)
    return found.config, Start(found.run_id, step, fork)


def _automatic(arguments: Arguments) -> tuple[Config | None, Start | None]:
    """Go on with the run of this key, if there is one that has not finished; else begin it."""
    from tunix_mlflow.tracking.runs import lookup

    config = arguments.load(DEFAULT)
    if not config.tracking.key:
        raise ConfigError("resume=auto needs tracking.key=NAME, by which the run is found again")
    found = lookup.of_key(config)
    if found is None:
        prepare(config)
        return config, None
    if found.finished:
        console.say(f"run {found.run_id} with key {config.tracking.key} has finished already")
        lookup.tag_launcher(found.run_id)
        console.result(run_id=found.run_id, finished=True)
        return None, None

    try:
        resumable = lookup.to_resume(found.run_id, lambda before: inherit_auto(config, before))
    except lookup.NotDescribed:  # killed in its first moments
        prepare(config)
        return config, Start(found.run_id)
    prepare(resumable.config, resumable.environment)
    return resumable.config, Start(resumable.run_id)


def summarize(trained: Trained) -> None:
    """The figures, for people."""
    figures = trained.figures
    console.say(
        f"final loss {figures['final_loss']:.4f} after {figures['total_steps']:.0f} steps,"
        f" {figures['avg_throughput']:,.0f} tokens/s"
    )
    for key, name in (("eval/loss", "held-out loss"), ("eval/exact_match", "held-out exact match")):
        if key in figures:
            console.say(f"{name} {figures[key]:.4f}")
    console.say(f"run {trained.run_id}: {trained.link}")


def _leakage(config: Config, manifest: Manifest) -> dict[str, float]:
    """Look for what will be evaluated in what is trained on; figures for the run.

    The dataset's own held-out split shares no prompt with it by construction, and its 8-grams
    are recorded only: the questions of one template share them.

    Raises:
        Refused: if a dataset of data.evaluation_sets leaks, unless data.leakage is record.
    """
    from tunix_mlflow.data import datasets

    figures: dict[str, float] = {}
    train = config.data.train_split
    if config.evaluation.split in manifest.splits:
        found = datasets.check_leakage(manifest, train, manifest, config.evaluation.split)
        figures |= {f"data/{k}": v for k, v in found.figures().items()}
    for key in config.data.evaluation_sets:
        evaluated = datasets.ready(key, console.say)
        found = datasets.check_leakage(manifest, train, evaluated, None)
        figures |= {f"data/{k}/{evaluated.key}": v for k, v in found.figures().items()}
        if not found.ok:
            message = (
                f"{evaluated.key} leaks into {manifest.key}/{train}: {len(found.exact)} prompts"
                f" are trained on, {len(found.overlapping)} overlap by 8-grams"
            )
            if config.data.leakage == "refuse":
                raise Refused(
                    f"{message}. See `tunix-mlflow datasets check-leakage {manifest.key}"
                    f" {evaluated.key}`, or set data.leakage=record"
                )
            console.say(f"{message}: recorded on the run")
    return figures


if __name__ == "__main__":
    process.run(main)
