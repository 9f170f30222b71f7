"""The one place that knows where this project's files live.

Everything is below one root: ``TUNIX_MLFLOW_HOME``, else ``~/.tunix-mlflow``. Nothing is
written into the current folder (``mlflow run`` changes it) or into the project's.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

HOME_VARIABLE = "TUNIX_MLFLOW_HOME"
SNAPSHOTS_VARIABLE = "TUNIX_MLFLOW_SNAPSHOTS"


def root() -> Path:
    """The absolute state root; it is created by whoever writes first."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser().absolute() if named else Path.home() / ".tunix-mlflow"


def catalog_path() -> Path:
    """The DuckDB file with examples and manifests."""
    return root() / "catalog.duckdb"


def snapshot_root() -> str:
    """Where snapshots are shared: ``TUNIX_MLFLOW_SNAPSHOTS``, a folder or an fsspec URL.

    Else a folder below the root.
    """
    return os.environ.get(SNAPSHOTS_VARIABLE) or str(root() / "snapshots")


def snapshot_dir(digest: str) -> Path:
    """The local folder of the snapshot of the dataset with this digest (64 hex).

    Snapshots of a root that is a URL are copied below the state root.
    """
    shared = snapshot_root().removeprefix("file://")
    if "://" in shared:
        return root() / "snapshots" / digest
    return Path(shared).expanduser().absolute() / digest


def run_dir(run_id: str) -> Path:
    """The local folder of one MLflow run: config.json, metrics.jsonl, checkpoints/."""
    return root() / "runs" / run_id


def open_runs() -> Path:
    """The folder of markers of runs that are open, or that MLflow does not have the end of."""
    return root() / "open"


def offline_tracking_uri() -> str:
    """The private tracking store used when ``tracking.offline`` is true."""
    return sqlite_uri(root() / "offline" / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite database; SQLAlchemy decodes what is behind `sqlite:///`."""
    encoded = "".join(
        quote(character) if character in "%?#" else character for character in str(path)
    )
    return f"sqlite:///{encoded}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite database; None for another address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def offline_artifacts() -> Path:
    """The artifact folder that belongs to :func:`offline_tracking_uri`."""
    return root() / "offline" / "artifacts"


def compilation_cache() -> Path:
    """JAX's persistent compilation cache."""
    return root() / "cache" / "jax"


def temporary_dir() -> Path:
    """Where short-lived copies go, such as a model that is being checked."""
    return root() / "tmp"


def project_root() -> Path:
    """The folder with MLproject, projects/ and seeds/: the checkout, or the wheel's copy."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "MLproject").is_file() and (checkout / "projects").is_dir():
        return checkout
    return package / "_project"
