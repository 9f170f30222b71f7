"""Snapshots: a dataset as Parquet files, named by its digest and verified when read.

Training reads only snapshots, so it never holds the catalog open. A snapshot is a folder

    DIGEST/snapshot.json         the manifest, and the sha256 of every file; written last
    DIGEST/examples-00000.parquet   digest, split, prompt_digest, canonical
    DIGEST/grams-SPLIT.npy       the 8-gram sketch of a split, see leakage.py

below the snapshot root, which may be any URL that fsspec can write to. Whoever has access to that
root has everything that training needs, without a catalog.

Within a process a file is hashed once, and the examples of a snapshot are hashed once: they are
not hashed again while inode, size and modification time of the files stay the same.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from msgspec import Struct

from tunix_mlflow import paths
from tunix_mlflow.data import canonical, leakage
from tunix_mlflow.data.examples import Example, from_canonical
from tunix_mlflow.data.leakage import Leakage, Sketch
from tunix_mlflow.data.manifest import Manifest
from tunix_mlflow.errors import DatasetError, IntegrityError, TunixMlflowError, UnavailableError
from tunix_mlflow.files import one_line, scratch, sha256_file

INDEX = "snapshot.json"
SCHEMA = pa.schema([(n, pa.string()) for n in ("digest", "split", "prompt_digest", "canonical")])
SHARD_BYTES = 256_000_000  # of canonical text in one file
_FILE = re.compile(r"[a-z0-9_-]{1,60}\.(parquet|npy)")
_Stat = tuple[int, int, int, int]  # device, inode, size, modification time
_hashed: dict[_Stat, str] = {}  # a file -> its sha256
_verified: dict[str, list[_Stat]] = {}  # dataset digest -> its files when last verified


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a snapshot."""

    name: str
    bytes: int
    sha256: str
    rows: int = 0


class Index(Struct, frozen=True, forbid_unknown_fields=True):
    """snapshot.json."""

    manifest: Manifest
    files: list[File]
    version: int = 1


def is_digest(text: str) -> bool:
    """Return whether a text is a dataset's digest rather than its key."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def exists(digest: str) -> bool:
    """Return whether there is a snapshot of this digest, locally or below the shared root."""
    return (_local(digest) / INDEX).is_file() or _remote_has(digest)


def write(manifest: Manifest, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the snapshot of a dataset, once per digest. It appears complete or not at all.

    Args:
        manifest: of the dataset.
        batches: digest, split, prompt_digest, prompt_text, canonical, as the catalog streams
            them; not read if the snapshot exists already.

    Raises:
        UnavailableError: if the snapshot root cannot be written to.
    """
    if exists(manifest.digest):
        return
    final = _local(manifest.digest)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with scratch(final.parent) as made:
            files = _write_files(made, batches)
            index = msgspec.json.encode(Index(manifest, files))
            (made / INDEX).write_bytes(index)
            made.chmod(0o755)
            _publish(made, manifest.digest, files)
            if final.exists() and not (final / INDEX).is_file():
                shutil.rmtree(final)  # incomplete
            try:
                made.rename(final)
            except OSError:
                if not (final / INDEX).is_file():  # otherwise another process was first
                    raise
    except OSError as error:
        raise UnavailableError(f"cannot write the snapshot {final}: {one_line(error)}") from error


def index(digest: str) -> Index:
    """Return the index of a snapshot.

    Raises:
        DatasetError: if there is no such snapshot.
        IntegrityError: if it cannot be read.
    """
    folder = _fetch(digest)
    try:
        result = msgspec.json.decode((folder / INDEX).read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError) as error:
        raise IntegrityError(f"the snapshot {folder} cannot be read: {error}") from error
    if result.manifest.digest != digest or not all(_FILE.fullmatch(f.name) for f in result.files):
        raise IntegrityError(f"the snapshot {folder} is damaged: it names {result.manifest.digest}")
    return result


def changed_files(digest: str) -> list[str]:
    """Return the files whose content is not what snapshot.json says; none without a snapshot."""
    if not exists(digest):
        return []
    folder, result = _fetch(digest), []
    for file in index(digest).files:
        path = folder / file.name
        if not path.is_file() or _sha256(path) != file.sha256:
            result.append(file.name)
    return result


def damage(digest: str) -> list[str]:
    """Return what is damaged in a snapshot; empty if its content is what the digest says."""
    try:
        if names := changed_files(digest):
            return [f"changed: {name}" for name in names]
        for _ in _checked(digest):
            pass
    except IntegrityError as error:
        return [str(error)]
    return []


def members(digest: str) -> pa.Table | None:
    """Return digest and split of each example; None if there is no readable snapshot."""
    try:
        folder, files = _fetch(digest), index(digest).files
        tables = [
            pq.read_table(folder / f.name, columns=["digest", "split"]) for f in files if f.rows
        ]
    except (OSError, pa.ArrowException, DatasetError, IntegrityError):
        return None
    return pa.concat_tables(tables)


def read(digest: str, split: str | None = None) -> list[Example]:
    """Return the examples, sorted by digest, after comparing each with its digest.

    Args:
        digest: the dataset's.
        split: only this split; None for all.

    Raises:
        DatasetError: if there is no such snapshot.
        IntegrityError: if its content does not match the digest.
    """
    texts = [(d, text) for d, s, text in _checked(digest) if split is None or s == split]
    texts.sort()
    return [from_canonical(text) for _, text in texts]


def read_splits(digest: str, names: Collection[str]) -> dict[str, list[Example]]:
    """Return the examples of several splits as :func:`read`, by one pass over the files.

    Args:
        digest: the dataset's.
        names: of splits; a split that the dataset does not have is an empty list.

    Raises:
        DatasetError: if there is no such snapshot.
        IntegrityError: if its content does not match the digest.
    """
    texts: dict[str, list[tuple[str, bytes]]] = {name: [] for name in names}
    for member, split, text in _checked(digest):
        if split in texts:
            texts[split].append((member, text))
    return {
        name: [from_canonical(text) for _, text in sorted(part)] for name, part in texts.items()
    }


def _checked(digest: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield digest, split and canonical bytes of every example, each verified; at the end, all."""
    stats = [_stat(_fetch(digest) / file.name) for file in index(digest).files]
    is_verified = _verified.get(digest) == stats
    lines: list[str] = []
    for batch in _batches(digest, ["digest", "split", "canonical"]):
        digests, splits = batch["digest"].to_pylist(), batch["split"].to_pylist()
        texts = batch["canonical"].cast(pa.binary()).to_pylist()
        for d, s, text in zip(digests, splits, texts, strict=True):
            if not is_verified and hashlib.sha256(text).hexdigest() != d:
                raise _damaged(digest, f" ({canonical.id_of(d)} changed)")
            yield d, s, text
        if not is_verified:
            lines += [f"{d}:{s}" for d, s in zip(digests, splits, strict=True)]
    if not is_verified and canonical.set_digest("tunix-dataset-v1", lines) != digest:
        raise _damaged(digest, "")
    _verified[digest] = stats


def leak(trained: str, train_split: str, evaluated: str, split: str | None) -> Leakage:
    """Compare an evaluation split with a training split, by their snapshots alone.

    Args:
        trained: digest of the dataset trained on.
        train_split: its split.
        evaluated: digest of the evaluation dataset.
        split: its split; None for all of it.

    Raises:
        DatasetError: if there is no such snapshot or split.
        IntegrityError: if one is damaged.
    """
    prompts: set[str] = set()
    for batch in _batches(trained, ["split", "prompt_digest"]):
        both = zip(batch["split"].to_pylist(), batch["prompt_digest"].to_pylist(), strict=True)
        prompts.update(p for s, p in both if s == train_split)
    name = f"grams-{train_split}.npy"
    path = _fetch(trained) / name
    listed = {file.name: file for file in index(trained).files}
    if name not in listed:
        raise DatasetError(f"dataset {trained[:12]} has no split {train_split!r}")
    if not path.is_file() or _sha256(path) != listed[name].sha256:
        raise _damaged(trained, f" ({name})")
    sketch = Sketch(np.load(path, allow_pickle=False))
    digests: list[str] = []
    prompt_digests: list[str] = []
    prompt_texts: list[str] = []
    for batch in _batches(evaluated, SCHEMA.names):
        for d, s, p, text in zip(*(batch[n].to_pylist() for n in SCHEMA.names), strict=True):
            if split is None or s == split:
                digests.append(d)
                prompt_digests.append(p)
                prompt_texts.append(from_canonical(text).prompt)

    def confirm(grams: leakage.Grams) -> npt.NDArray[np.bool_]:
        return _among_grams(trained, train_split, grams)

    return leakage.compare(prompts, sketch, digests, prompt_digests, prompt_texts, confirm)


def _among_grams(digest: str, split: str, grams: leakage.Grams) -> npt.NDArray[np.bool_]:
    """Return which 8-grams are in the prompts of a split, exactly."""
    result = np.zeros(len(grams), np.bool_)
    for batch in _batches(digest, ["split", "canonical"]):
        texts = batch["canonical"].filter(pc.equal(batch["split"], split)).to_pylist()
        prompts = pa.array([from_canonical(text).prompt for text in texts], pa.string())
        result |= np.isin(grams, leakage.grams(prompts)[0])
    return result


def _write_files(folder: Path, batches: Iterable[pa.RecordBatch]) -> list[File]:
    files: list[File] = []
    grams: dict[str, list[leakage.Grams]] = {}
    shards: list[tuple[Path, int]] = []
    writer, size = None, 0
    for batch in batches:
        if writer is None or size >= SHARD_BYTES:
            if writer is not None:
                writer.close()
            path, size = folder / f"examples-{len(shards):05d}.parquet", 0
            writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=["split"])
            shards.append((path, 0))
        part = batch.select(SCHEMA.names).cast(SCHEMA)
        writer.write_batch(part)
        shards[-1] = (shards[-1][0], shards[-1][1] + part.num_rows)
        size += part.nbytes
        hashes, owner = leakage.grams(batch["prompt_text"])
        splits = np.array(batch["split"].to_pylist(), dtype=object)
        for name in set(splits):
            inside = (splits == name)[owner] if len(owner) else np.zeros(0, bool)
            grams.setdefault(name, []).append(np.unique(hashes[inside]))
    if writer is not None:
        writer.close()
    for path, rows in shards:
        files.append(File(path.name, path.stat().st_size, _sha256(path), rows))
    for name, parts in sorted(grams.items()):
        path = folder / f"grams-{name}.npy"
        np.save(path, Sketch.of(parts).bits, allow_pickle=False)
        files.append(File(path.name, path.stat().st_size, _sha256(path)))
    return files


def _batches(digest: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    folder = _fetch(digest)
    for file in index(digest).files:
        if not file.rows:
            continue
        path = folder / file.name
        try:
            with pq.ParquetFile(path) as opened:
                yield from opened.iter_batches(batch_size=10_000, columns=columns)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"the snapshot {path} cannot be read: {one_line(error, 300)}; delete its folder"
            ) from error


def _damaged(digest: str, what: str) -> IntegrityError:
    return IntegrityError(f"the snapshot {_local(digest)} is damaged{what}; delete its folder")


def _local(digest: str) -> Path:
    if not is_digest(digest):
        raise DatasetError(f"{digest[:80]!r} is not a dataset digest: expected 64 hex digits")
    return paths.snapshot_dir(digest)


def _root() -> str | None:
    """Return the shared root, if it is not a local folder."""
    root = paths.snapshot_root()
    return None if root.startswith("file://") or "://" not in root else root


def _remote(digest: str) -> tuple[Any, str]:
    system, path = file_system()
    return system, f"{path}/{digest}"


def file_system() -> tuple[Any, str]:
    """Return what the snapshot root is reached by, and the path of the root there.

    Raises:
        DatasetError: if no package here knows such a root.
    """
    root = paths.snapshot_root()
    try:
        system, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise DatasetError(f"{paths.SNAPSHOTS_VARIABLE}={root}: {error}") from error
    return system, path.rstrip("/")


def _remote_has(digest: str) -> bool:
    if _root() is None:
        return False
    system, path = _remote(digest)
    try:
        return bool(system.exists(f"{path}/{INDEX}"))
    except Exception as error:  # each file system has errors of its own
        raise UnavailableError(f"cannot reach {_root()}: {one_line(error, 300)}") from error


def _publish(folder: Path, digest: str, files: list[File]) -> None:
    if _root() is None:
        return
    system, path = _remote(digest)
    try:
        system.makedirs(path, exist_ok=True)
        # The index is written last: with it the snapshot is complete.
        for name in [*(f.name for f in files), INDEX]:
            system.put_file(str(folder / name), f"{path}/{name}")
    except Exception as error:
        raise UnavailableError(f"cannot write to {_root()}: {one_line(error, 300)}") from error


def _fetch(digest: str) -> Path:
    """Return the local folder of a snapshot, copied from the shared root if necessary."""
    folder = _local(digest)
    if (folder / INDEX).is_file():
        return folder
    if not _remote_has(digest):
        where = _root() or str(folder.parent)
        raise DatasetError(
            f"there is no snapshot of {digest[:12]} in {where}; run `tunix-mlflow datasets"
            " show KEY` where the catalog is"
        )
    system, path = _remote(digest)
    try:
        with scratch(folder.parent) as made:
            system.get_file(f"{path}/{INDEX}", str(made / INDEX))
            listed = msgspec.json.decode((made / INDEX).read_bytes(), type=Index)
            for file in listed.files:
                if not _FILE.fullmatch(file.name):
                    raise _damaged(digest, f" ({file.name!r})")
                system.get_file(f"{path}/{file.name}", str(made / file.name))
                if _sha256(made / file.name) != file.sha256:
                    raise IntegrityError(f"{path}/{file.name} does not match its digest")
            made.chmod(0o755)
            if not folder.exists():
                made.rename(folder)
    except TunixMlflowError:
        raise
    except Exception as error:
        raise UnavailableError(f"cannot read {path}: {one_line(error, 300)}") from error
    return folder


def _stat(path: Path) -> _Stat:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (0, 0, 0, 0)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sha256(path: Path) -> str:
    """Return the sha256 of a file, computed once per process while the file is the same."""
    stat = _stat(path)
    if stat not in _hashed:
        _hashed[stat] = sha256_file(path)
    return _hashed[stat]
