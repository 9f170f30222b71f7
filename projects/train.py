"""Train a decoder on a dataset, from scratch or from the last checkpoint of a run.

    mlflow run . -e train --env-manager local -P dataset=golden-v2
    tunix-mlflow train column-addition training.steps=200
    tunix-mlflow resume RUN_ID

Two cores: golden-v2 takes half a minute, column-addition one and a half.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tunix_mlflow import bootstrap
from tunix_mlflow import config as configs
from tunix_mlflow.config import Config
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import ConfigError, DatasetError, Refused

from . import console

OWN = ("resume",)
DEFAULT = "golden-v2"


class Trained(NamedTuple):
    """What training hands on."""

    run_id: str
    link: str
    ui: str | None  # the command that opens the UI on a local store
    model_id: str
    manifest: Manifest
    figures: dict[str, float]


def train(config: Config, *, resume: str | None = None) -> Trained:
    """Verify the dataset, train, log the model.

    Args:
        config: the run's configuration.
        resume: id of the run to go on with; its configuration must be `config`.

    Raises:
        InputError: for a dataset, device or run that cannot be used; no run is started.
        Refused: if the dataset is not what its manifest says, or an evaluation set leaks.
        TrainingStopped: when the loss is not finite.
    """
    from tunix_mlflow.data import batches, chat, datasets, snapshot
    from tunix_mlflow.data.tokenizer import ByteTokenizer
    from tunix_mlflow.evaluation import scoring
    from tunix_mlflow.models import bundle as bundles
    from tunix_mlflow.models import decoder
    from tunix_mlflow.tracking import flavor, note, store
    from tunix_mlflow.tracking.session import session
    from tunix_mlflow.training import checkpoint, devices, loop, optimizer, step

    if config.dataset is None:
        raise ConfigError("dataset is missing; give dataset=KEY, or seed or ingest one")
    store.connect(config.tracking)  # a dead server is said before any work
    manifest = datasets.ready(config.dataset, console.say)
    device = devices.use(config.device)

    # Examples -> rows of tokens.
    tokenizer = ByteTokenizer()
    if config.data.train_split not in manifest.splits:
        raise DatasetError(
            f"dataset {manifest.key} has no split {config.data.train_split!r};"
            f" it has {', '.join(manifest.splits)}"
        )
    wanted = config.evaluation.split
    if wanted not in manifest.splits and (len(manifest.splits) > 1 or wanted != "test"):
        raise DatasetError(
            f"dataset {manifest.key} has no split {wanted!r} to hold out;"
            f" it has {', '.join(manifest.splits)}. Set evaluation.split"
        )
    examples = snapshot.read(manifest.digest, config.data.train_split)
    held_out = snapshot.read(manifest.digest, config.evaluation.split)
    leaks = _leakage(config, manifest)
    config = _with_length(
        config,
        batches.longest([*examples, *held_out], tokenizer, config.data.include_steps),
    )
    length = config.data.sequence_length or 0
    rows = batches.tokenize(examples, tokenizer, config.data, length)
    held_out_rows = batches.tokenize(held_out, tokenizer, config.data, length) if held_out else None
    max_new_tokens = config.evaluation.max_new_tokens or batches.longest_completion(rows)
    if held_out_rows is None:
        console.say(f"no examples in split {config.evaluation.split!r}: nothing is held out")

    # Parameters and optimizer.
    graph, params = decoder.build(config.model, tokenizer.vocab_size, config.seed)
    rule = optimizer.build(config.optimizer, config.training.steps)
    state = step.init_state(params, rule)
    count = decoder.parameter_count(params)
    console.say(
        f"{manifest.key}: {len(examples)} examples in {len(rows.rows)} rows of {length} tokens"
        f" ({rows.fill:.0%} full), {len(held_out)} held out; {count:,} parameters on {device}"
    )
    identity = {
        "dataset_digest": manifest.digest,
        "tokenizer_digest": tokenizer.digest,
        "template_digest": chat.template_digest(config.data.include_steps),
        "config_digest": configs.digest(config),
    }
    tags = {f"tunix.{name}": value for name, value in identity.items()}
    tags |= {f"tunix.{name}": value for name, value in devices.fingerprint(device).items()}
    tags |= {"tunix.dataset": manifest.key}

    with session(config, stage="train", run_id=resume, tags=tags) as run:
        console.say(f"run {run.run_id}: {run.link}")
        run.log_dataset(manifest, config.data.train_split, usage="training")
        if held_out:
            run.log_dataset(manifest, config.evaluation.split, usage="evaluation")
        run.log_note(note.training(config, manifest, run.run_id, run.link))
        run.write_scalars(
            0,
            {
                "data/fill": rows.fill,
                "data/truncated": rows.truncated,
                "data/dropped": rows.dropped,
                **leaks,
                "model/parameters": count,
            },
        )
        checkpoints = checkpoint.Checkpoints(
            run.folder / "checkpoints",
            identity | devices.fingerprint(device),
            keep_last=config.checkpoints.keep_last,
            on_sealed=(
                (lambda folder, _: run.log_folder(folder, f"checkpoints/{folder.name}"))
                if config.checkpoints.upload
                else None
            ),
        )
        if resume is not None and config.checkpoints.upload:
            for folder in checkpoint.steps(checkpoints.folder):  # a kill may have cut one off
                run.log_folder(folder, f"checkpoints/{folder.name}")
        restored = checkpoints.restore_latest(state, run.report)
        if restored is not None:
            console.say(f"resuming run {run.run_id} after step {restored[0]}")
            state = restored[1]
        elif resume is not None:
            console.say(f"run {run.run_id} has no checkpoint: starting at step 0 again")
        progress = console.TrainingProgress(int(state.step), config.training.steps)

        def evaluate(state: step.TrainState) -> dict[str, float]:
            assert held_out_rows is not None
            parts = batches.eval_batches(held_out_rows, config.training.batch_size)
            return loop.held_out_loss(graph, state.params, parts)

        try:
            console.say(f"if it is interrupted: tunix-mlflow resume {run.run_id}")
            state = loop.fit(
                config,
                state,
                batches.TrainBatches(rows, batch_size=config.training.batch_size, seed=config.seed),
                graph=graph,
                optimizer=rule,
                writers=[run, progress],
                checkpoints=checkpoints,
                evaluate=evaluate if held_out_rows is not None else None,
            )
        finally:
            progress.close()
            checkpoints.close()
        last = config.training.steps
        bundle = bundles.Bundle(config.model, graph, state.params, tokenizer, max_new_tokens)
        sample = scoring.scorable(held_out, config.evaluation.samples)
        figures: dict[str, float] = {}
        if sample:
            judged = scoring.score(sample, bundle.complete, config.evaluation.batch_size)
            figures["eval/exact_match"] = scoring.exact_match(judged).value
            run.write_scalars(last, figures)
            run.log_table(scoring.table(judged), f"generations/step-{last:08d}.json")
        figures |= run.log_summary(last)
        run.sync()
        weights = {"tunix.weights_digest": bundles.weights_digest(state.params)}
        model_id = flavor.log_model(
            bundle,
            run_id=run.run_id,
            step=last,
            prompts=[example.prompt for example in (held_out or examples)[:3]],
            tags=weights | {name: tags[name] for name in ("tunix.dataset", "tunix.dataset_digest")},
        )
        run.set_tags(weights)
        run.log_file(run.folder / "metrics.jsonl")
        figures |= run.last("eval/loss")
        return Trained(run.run_id, run.link, store.ui_command(), model_id, manifest, figures)


def main(argv: Sequence[str]) -> None:
    """Parse, train, print."""
    arguments = bootstrap.parse(argv, OWN)
    resume = arguments.stage.get("resume")
    if resume is None:
        config = arguments.load(DEFAULT)
        bootstrap.prepare(config)
    else:
        if arguments.config or arguments.overrides:
            raise ConfigError("a resumed run keeps its configuration; give nothing but its id")
        from tunix_mlflow.tracking import runs

        config, environment = runs.to_resume(resume)
        bootstrap.prepare(config, environment)
    trained = train(config, resume=resume)
    summarize(trained)
    if trained.ui:
        console.say(f"to look at it: {trained.ui}")
    console.result(
        run_id=trained.run_id,
        model_id=trained.model_id,
        dataset=trained.manifest.key,
        **trained.figures,
    )


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


def _with_length(config: Config, needed: int) -> Config:
    from tunix_mlflow.data.batches import LONGEST_FIT, fit_length

    if config.data.sequence_length is not None:
        return config
    if needed > LONGEST_FIT:
        raise DatasetError(
            f"the longest example of {config.dataset} needs {needed} tokens; attention takes"
            " memory by the square of that. Set data.sequence_length, and if need be"
            " data.overlong=truncate or drop"
        )
    data = msgspec.structs.replace(config.data, sequence_length=fit_length(needed))
    return msgspec.structs.replace(config, data=data)


if __name__ == "__main__":
    sys.exit(bootstrap.execute(main, sys.argv[1:]))
