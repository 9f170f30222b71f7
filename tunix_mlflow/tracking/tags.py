"""The tags by which runs and models are found, and what makes a run a training run."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "tunix_mlflow."
STAGE = f"{PREFIX}stage"
VERSION = f"{PREFIX}version"
KEY = f"{PREFIX}key"
ERROR = f"{PREFIX}error"
CONFIG_DIGEST = f"{PREFIX}config_digest"
DATASET = f"{PREFIX}dataset"
DATASET_DIGEST = f"{PREFIX}dataset_digest"
WEIGHTS_DIGEST = f"{PREFIX}weights_digest"
CONTENT_DIGEST = f"{PREFIX}content_digest"
PACKAGE_DIGEST = f"{PREFIX}package_digest"
STEP = f"{PREFIX}step"  # of a logged model
PROMOTION = f"{PREFIX}promotion"
MODEL = f"{PREFIX}model"  # a registered model's name
MODEL_VERSION = f"{PREFIX}model_version"
TRAINING_RUN = f"{PREFIX}training_run"  # on runs that used a model: the run that trained it
FORKED_FROM = f"{PREFIX}forked_from"
LAUNCHER_OF = f"{PREFIX}launcher_of"
"""On a run that `mlflow run` made only to resume another: that one's id."""
LOCAL_ID = f"{PREFIX}local_id"
LEASE = f"{PREFIX}lease"
TAKEN_OVER = f"{PREFIX}taken_over"  # why a process did not wait for another one's lease
INCOMPLETE = f"{PREFIX}incomplete"  # counts, by lane, of what MLflow refuses of a run
GIT_DIRTY = f"{PREFIX}git_dirty"
GIT_COMMIT = "mlflow.source.git.commit"
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"

TRAINING_FILTER = f"tags.`{STAGE}` = 'train'"
"""For `search_runs`, to find few; :func:`is_training_run` decides."""


def is_training_run(tags: Mapping[str, str]) -> bool:
    """Return whether the tags are those of a training run of ours, which can be resumed."""
    return tags.get(STAGE) == "train" and DATASET_DIGEST in tags and LAUNCHER_OF not in tags
