"""MLflow's own code for texts, figures and images, recorded instead of uploaded; tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.tracking import MlflowClient

from tunix_mlflow.errors import TrackingError


class Recorder(MlflowClient):
    """A client whose log_text, log_dict, log_figure and log_image record in a run's folder."""

    def __init__(
        self,
        record_artifact: Callable[[str | Path, str | None], None],
        record_tag: Callable[[str, Any], None],
    ) -> None:
        super().__init__()
        self._record_artifact, self._record_tag = record_artifact, record_tag

    def log_artifact(
        self, run_id: str, local_path: str | Path, artifact_path: str | None = None
    ) -> None:
        """Record a file; the others write one and end here."""
        self._record_artifact(local_path, artifact_path)

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        """Record a tag; log_image sets one."""
        self._record_tag(key, value)


def encode_table(data: Mapping[str, Any] | pd.DataFrame, artifact_file: str) -> bytes:
    """Return a table as the JSON that MLflow's UI and `mlflow.load_table` read.

    Args:
        data: columns by name, of equal length, or a DataFrame.
        artifact_file: the artifact's name; ends in .json.

    Raises:
        TrackingError: if it is not that.
    """
    if not artifact_file.endswith(".json"):
        raise TrackingError(f"log_table: {artifact_file!r} must end in .json")
    if isinstance(data, pd.DataFrame):
        columns = {str(name): data[name].tolist() for name in data.columns}
    elif isinstance(data, Mapping):
        columns = {
            str(name): [values]
            if isinstance(values, str) or not hasattr(values, "__len__")
            else list(values)
            for name, values in data.items()
        }
    else:
        raise TrackingError(
            f"log_table: expected columns or a DataFrame, got {type(data).__name__}"
        )
    try:
        rows = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
    except ValueError as error:
        lengths = {name: len(values) for name, values in columns.items()}
        raise TrackingError(f"log_table: columns of different lengths: {lengths}") from error
    table = {"columns": list(columns), "data": rows}
    return json.dumps(table, ensure_ascii=False, default=_plain).encode()


def _cell(value: Any) -> Any:
    """Return a value as JSON has it, which has neither numpy's types nor NaN."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_cell(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _cell(each) for name, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
