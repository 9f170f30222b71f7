"""The logic of the seed system (tunix-rt), which this project remakes, for the suite `data`.

json and pydantic, rows through SQLAlchemy's ORM into SQLite, filters in Python; written after that
system's services (github.com/m-cahill/tunix-rt: schemas/trace.py, db/models/trace.py). Where those
have a fast and a slow way, the fast one is taken: synchronous sessions, one query to read a batch
back. It does less than this project: no digests, no splits, and its verify does not notice a
changed text.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tunix_mlflow.config.schema import LimitsConfig

_BATCH = 1_000
"""Traces of a batch, as in the seed system; SQLite takes no million ids in one query."""


class Models(NamedTuple):
    """What the services work with."""

    trace: Any  # the pydantic model of a trace
    row: Any  # the SQLAlchemy model of the table
    session: Callable[[Path], Any]  # of the database beside a file


@functools.cache
def models() -> Models:
    """Import pydantic and SQLAlchemy, and return the models, with our limits."""
    import sqlalchemy
    from pydantic import BaseModel, Field, field_validator
    from sqlalchemy import orm

    limits = LimitsConfig()

    class Step(BaseModel):
        i: int = Field(ge=0)
        type: str = Field(min_length=1, max_length=limits.type_characters)
        content: str = Field(min_length=1, max_length=limits.step_characters)

    class Trace(BaseModel):
        prompt: str = Field(min_length=1, max_length=limits.prompt_characters)
        answer: str = Field(min_length=1, max_length=limits.answer_characters)
        steps: list[Step] = Field(min_length=1, max_length=limits.steps)
        meta: dict[str, Any] | None = None

        @field_validator("steps")
        @classmethod
        def unique(cls, steps: list[Any]) -> list[Any]:
            if len({step.i for step in steps}) != len(steps):
                raise ValueError("step indices must be unique")
            return steps

    Trace.model_rebuild(_types_namespace={"Step": Step, "Any": Any})
    base = orm.declarative_base()
    columns = {
        "__tablename__": "traces",
        "id": sqlalchemy.Column(sqlalchemy.Uuid, primary_key=True, default=uuid.uuid4),
        "created_at": sqlalchemy.Column(
            sqlalchemy.DateTime(timezone=True), default=lambda: datetime.now(UTC), index=True
        ),
        "trace_version": sqlalchemy.Column(sqlalchemy.String(64), nullable=False),
        "payload": sqlalchemy.Column(sqlalchemy.JSON, nullable=False),
    }
    row = type("Row", (base,), columns)

    def session(file: Path) -> Any:
        engine = sqlalchemy.create_engine(f"sqlite:///{file.with_suffix('.db')}")
        base.metadata.create_all(engine)
        return orm.Session(engine)

    return Models(Trace, row, session)


def ingest(file: Path) -> None:
    """Validate and store every line of a JSONL file, in a database beside it.

    Raises:
        RuntimeError: if a trace is not in the database afterwards.
    """
    from sqlalchemy import inspect, select

    trace, row, session = models()
    with file.open(encoding="utf-8") as lines, session(file) as db:
        for batch in _batched(lines):
            validated = [trace(**json.loads(line)) for line in batch]
            rows = [row(trace_version="1.0", payload=model.model_dump()) for model in validated]
            db.add_all(rows)
            db.commit()
            # Not `row.id`, which would read each again: the commit has expired it.
            ids = [inspect(each).identity[0] for each in rows]
            stored = [each.id for each in db.scalars(select(row).where(row.id.in_(ids)))]
            if len(stored) != len(batch):
                raise RuntimeError("the seed system lost a trace")
            db.expunge_all()


def build(file: Path, manifest: Path, filters: Mapping[str, Any], limit: int | None) -> None:
    """Select traces and write their ids and statistics.

    Args:
        file: that was ingested.
        manifest: the file to write.
        filters: meta key -> value, or {"ge": least value}.
        limit: most traces; None: all.
    """
    from sqlalchemy import select

    _, row, session = models()
    with session(file) as db:
        rows = db.scalars(select(row).order_by(row.created_at.desc())).all()
        selected = [r for r in rows if _matches(r.payload.get("meta") or {}, filters)][:limit]
        steps = [len(r.payload["steps"]) for r in selected]
        sizes = [
            len(r.payload["prompt"])
            + len(r.payload["answer"])
            + sum(len(step["content"]) for step in r.payload["steps"])
            for r in selected
        ]
        stats = {"steps": statistics.fmean(steps), "characters": statistics.fmean(sizes)}
        content = {"ids": [str(r.id) for r in selected], "count": len(selected), "stats": stats}
    manifest.write_text(json.dumps(content))


def verify(file: Path, manifest: Path) -> None:
    """Validate the traces of a manifest.

    Raises:
        RuntimeError: if one is missing.
    """
    trace, _, _ = models()
    ids = json.loads(manifest.read_text())["ids"]
    stored = []
    for row in _rows(file, ids):
        trace(**row.payload)
        stored.append(str(row.id))
    if stored != ids:
        raise RuntimeError("the seed system's rows are not those of its manifest")


def export(file: Path, manifest: Path, target: Path) -> None:
    """Write the traces of a manifest as JSONL."""
    trace, _, _ = models()
    lines = []
    for row in _rows(file, json.loads(manifest.read_text())["ids"]):
        payload = trace(**row.payload)
        record = {
            "id": str(row.id),
            "prompt": payload.prompt,
            "steps": [step.content for step in payload.steps],
            "answer": payload.answer,
            "metadata": {"created_at": row.created_at.isoformat(), **(payload.meta or {})},
        }
        lines.append(json.dumps(record))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _matches(meta: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    return all(
        meta[key] >= value["ge"] if isinstance(value, dict) else meta.get(key) == value
        for key, value in filters.items()
    )


def _rows(file: Path, ids: Sequence[str]) -> Iterator[Any]:
    """Yield the rows with these ids, in this order."""
    from sqlalchemy import select

    _, row, session = models()
    with session(file) as db:
        for batch in _batched(ids):
            uuids = [uuid.UUID(text) for text in batch]
            by_id = {each.id: each for each in db.scalars(select(row).where(row.id.in_(uuids)))}
            yield from (by_id[each] for each in uuids if each in by_id)
            db.expunge_all()


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch
