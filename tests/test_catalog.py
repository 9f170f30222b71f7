"""The catalog: what is stored is what the manifest says, or it is named."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import write_traces
from tunix_mlflow import files, paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, datasets, parsing, snapshot, sources, staging
from tunix_mlflow.data.catalog import connection, migrations, read, store
from tunix_mlflow.data.examples import ReasoningTrace, canonical_bytes
from tunix_mlflow.data.manifest import parse_key
from tunix_mlflow.errors import DatasetError, IntegrityError, Refused


@pytest.fixture
def doubles(tmp_path: Path) -> str:
    """A dataset of 40 traces."""
    datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 40), "doubles-v1")
    return "doubles-v1"


def tamper(*statements: str) -> None:
    con = duckdb.connect(str(paths.catalog_path()))
    for statement in statements:
        con.execute(statement)
    con.close()


def parse(stage: staging.Stage, path: Path) -> None:
    """Read a JSONL file of traces."""
    parsing.read_files(
        stage,
        sources.find_sources([str(path)]),
        form="trace",
        mapping={},
        limits=LimitsConfig(),
        skip_bad=False,
        progress=lambda done, total: None,
    )


def first_member(key: str) -> str:
    with connection.connect(paths.catalog_path(), write=False) as con:
        rows = con.execute(
            "SELECT digest FROM members WHERE key = ? ORDER BY position", [key]
        ).fetchall()
    return str(rows[0][0])


TAMPERINGS = {
    "missing": "DELETE FROM examples WHERE digest = '{d}'",
    "changed": "UPDATE examples SET canonical = replace(canonical, 'Double', 'Triple')"
    " WHERE digest = '{d}'",
    "changed (a typed column)": "UPDATE examples SET meta = '{{}}' WHERE digest = '{d}'",
    "duplicated": "INSERT INTO examples SELECT * FROM examples WHERE digest = '{d}'",
    "duplicated (as a member)": "INSERT INTO members SELECT * FROM members WHERE digest = '{d}'",
    "missing (from the members)": "DELETE FROM members WHERE digest = '{d}'",
    "notes (count)": "UPDATE manifests SET"
    " document = replace(document, '\"count\":40', '\"count\":7')",
    "notes (positions)": "UPDATE members SET position = position + 1000",
    "extra": "INSERT INTO members SELECT 'doubles-v1', 40, digest, 'train' FROM examples"
    " WHERE canonical LIKE '%Double 99\"%'",
    "extra (in another's place)": "INSERT INTO members SELECT 'doubles-v1', 3, digest, 'train'"
    " FROM examples WHERE canonical LIKE '%Double 99\"%'",
}


@pytest.mark.parametrize("kind", TAMPERINGS)
@pytest.mark.parametrize("with_snapshot", [True, False])
def test_verify_names_what_was_done(
    doubles: str, tmp_path: Path, kind: str, with_snapshot: bool
) -> None:
    """A deleted, edited, duplicated or added trace is named by id, and training is refused."""
    datasets.ingest(write_traces(tmp_path / "other.jsonl", 1, start=99), "other-v1")
    assert datasets.verify(doubles).ok
    digest = first_member(doubles)
    if not with_snapshot:
        shutil.rmtree(paths.snapshot_dir(datasets.get(doubles).digest))
    tamper(TAMPERINGS[kind].format(d=digest))
    report = datasets.verify(doubles)
    assert not report.ok
    named = getattr(report, kind.split()[0])
    if kind.startswith("notes"):
        assert report.notes or report.extra
        return
    if kind.startswith("extra"):
        digest = first_member("other-v1")
    if kind == "missing (from the members)" and not with_snapshot:
        assert report.notes  # the digest is wrong; who is missing only the snapshot knows
    else:
        assert digest in named
        assert canonical.id_of(digest) in report.summary()
    with pytest.raises(Refused, match="does not match its manifest"):
        datasets.ready(doubles, print)


def test_a_key_is_immutable(doubles: str, tmp_path: Path) -> None:
    """The same file again is identical; another one under the key is refused by digest."""
    same = datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 40), doubles)
    assert not same.created
    digest = datasets.get(doubles).digest
    with pytest.raises(DatasetError, match=f"{digest[:16]}.*new version"):
        datasets.ingest(write_traces(tmp_path / "doubles.jsonl", 41), doubles)
    assert datasets.get(doubles).digest == digest
    assert datasets.verify(doubles).ok


def test_ingest_keeps_duplicates_once(tmp_path: Path) -> None:
    """The same trace twice is one row, and the statistics say so."""
    path = write_traces(tmp_path / "a.jsonl", 5)
    path.write_text(path.read_text() * 2)
    manifest = datasets.ingest(path, "twice-v1").manifest
    assert manifest.count == 5
    assert manifest.stats["duplicates_dropped"] == 5


GOOD = '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a"}'
BAD_LINES = {
    "{": "not a reasoning trace",
    "[]": "Expected `object`",
    "null": "Expected `object`",
    '{"prompt": "p", "answer": "a"}': "steps",
    '{"prompt": "p", "steps": [], "answer": "a"}': r"\$.steps",
    '{"prompt": "", "steps": [{"content": "s"}], "answer": "a"}': r"\$.prompt",
    '{"prompt": "p", "steps": [{"content": 5}], "answer": "a"}': r"\$.steps\[0\].content",
    '{"prompt": "p", "steps": [{"i": 3, "content": "s"}], "answer": "a"}': r"steps\[0\].i is 3",
    '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "x": 1}': "unknown field",
    '{"prompt": "p", "prompt": "q", "steps": [{"content": "s"}], "answer": "a"}': "duplicate key",
    '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "meta": {"v": NaN}}': "NaN",
    '{"prompt": "\\ud800", "steps": [{"content": "s"}], "answer": "a"}': "surrogate",
    '{"prompt": "a\\u0000", "steps": [{"content": "s"}], "answer": "a"}': "NUL",
    '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "split": "../x"}': r"\$.split",
    '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "split": "x\\n"}': r"\$.split",
    '{"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "meta": {"m": '
    + "[" * 200
    + "]" * 200
    + "}}": "not a reasoning trace",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_stored(tmp_path: Path, line: str) -> None:
    """File, line number and field are in the message; the good lines before it are not kept."""
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DatasetError, match=BAD_LINES[line]) as caught:
        datasets.ingest(path, "bad-v1")
    assert f"{path}:2:" in str(caught.value)
    assert read.listing(paths.catalog_path()) == []


@pytest.mark.parametrize("content", [b"\xff\xfe{}\n", b"\xef\xbb\xbf{}\n", b"", b"x" * 1_100_000])
def test_a_file_that_is_no_jsonl(tmp_path: Path, content: bytes) -> None:
    """Binary, marked, empty and endless files are one line each."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=str(path)):
        datasets.ingest(path, "bad-v1")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass"))
    | st.dictionaries(
        st.sampled_from(["prompt", "steps", "answer", "split", "meta", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["i", "type", "content"]), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    ).map(lambda d: json.dumps(d).encode())
)
def test_any_line_is_read_or_refused(tmp_path: Path, line: bytes) -> None:
    """No bytes make anything but traces or a DatasetError."""
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(line + b"\n")
    try:
        with staging.new_stage() as stage:
            parse(stage, path)
            texts = [t for batch in stage.batches() for t in batch["canonical"].to_pylist()]
    except DatasetError as error:
        assert "\n" not in str(error)
        return
    assert all(canonical.encode(json.loads(text)).decode() == text for text in texts)


@pytest.mark.parametrize("key", ["golden", "golden-2", "-v1", "Golden-v1", "a/b-v1", "a-v1-", ""])
def test_a_key_is_name_and_version(key: str) -> None:
    """Anything else is refused before the catalog is opened."""
    with pytest.raises(DatasetError, match="not a dataset key"):
        datasets.get(key)


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True), st.integers(0, 999))
def test_a_key_splits_one_way(name: str, version: int) -> None:
    """Whatever dashes the name has."""
    assert parse_key(f"{name}-v{version}") == (name, f"v{version}")


def test_a_corrupt_catalog_is_one_line(home: Path) -> None:
    """The file is named; nothing is overwritten."""
    home.mkdir()
    paths.catalog_path().write_bytes(b"this is no database" * 500)
    with pytest.raises(DatasetError, match=r"catalog.duckdb cannot be used"):
        datasets.get("golden-v1")
    with pytest.raises(DatasetError, match=r"catalog.duckdb cannot be used"):
        datasets.seed("golden-v1")
    assert paths.catalog_path().read_bytes().startswith(b"this is no database")


def test_a_newer_catalog_is_refused(doubles: str) -> None:
    """Migrations go forward only."""
    tamper("INSERT INTO migrations VALUES (99, 'm099_from_the_future')")
    with pytest.raises(DatasetError, match="newer version"):
        datasets.get(doubles)
    with pytest.raises(DatasetError, match="newer version"):
        datasets.seed("golden-v1")


def test_another_programs_database_is_left_alone(home: Path) -> None:
    """It is not migrated, and not called old."""
    home.mkdir()
    con = duckdb.connect(str(paths.catalog_path()))
    con.execute("CREATE TABLE theirs AS SELECT 1 AS x")
    con.close()
    for call in (lambda: datasets.get("golden-v1"), lambda: datasets.seed("golden-v1")):
        with pytest.raises(DatasetError, match="another program"):
            call()


def test_migrations_are_recorded_in_order(doubles: str) -> None:
    """What is applied is exactly the list."""
    with connection.connect(paths.catalog_path(), write=False) as con:
        assert migrations.applied(con) == [m.name for m in migrations.MIGRATIONS]


def test_a_damaged_snapshot_is_refused(doubles: str) -> None:
    """Training reads nothing whose digest is wrong."""
    digest = datasets.get(doubles).digest
    path = paths.snapshot_dir(digest) / "examples-00000.parquet"
    other = paths.snapshot_dir(datasets.seed("golden-v1").manifest.digest) / path.name
    good = path.read_bytes()
    path.write_bytes(other.read_bytes())
    with pytest.raises(IntegrityError, match="damaged"):
        snapshot.read(digest)
    path.write_bytes(good[:-20])
    with pytest.raises(IntegrityError, match="cannot be read"):
        snapshot.read(digest)
    assert not datasets.verify(doubles).ok


def test_readers_and_writers_take_turns(doubles: str, tmp_path: Path) -> None:
    """Four readers and two writers at once: no error, nothing lost."""
    errors: list[BaseException] = []

    def attempt(work: object) -> None:
        try:
            assert callable(work)
            work()
        except BaseException as error:
            errors.append(error)

    def write(n: int) -> None:
        for i in range(3):
            path = write_traces(tmp_path / f"{n}-{i}.jsonl", 5, start=1000 * n + 10 * i)
            datasets.ingest(path, f"w{n}-v{i}")

    def read_often() -> None:
        for _ in range(10):
            assert datasets.get(doubles).count == 40

    works = [lambda n=n: write(n) for n in range(2)] + [read_often] * 4
    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(read.listing(paths.catalog_path())) == 7


def test_null_meta_is_absent() -> None:
    """A null that a format invents changes no digest."""
    step = [{"i": 0, "type": "t", "content": "c"}]
    import msgspec

    def digest(meta: dict[str, object]) -> str:
        trace = msgspec.convert(
            {"prompt": "p", "steps": step, "answer": "a", "meta": meta}, ReasoningTrace
        )
        return canonical.digest(canonical_bytes(trace.example()))

    assert digest({"a": 1, "b": None}) == digest({"a": 1}) == digest({"a": 1.0})


def test_the_name_of_a_file_is_no_part_of_a_dataset(tmp_path: Path) -> None:
    """The same traces from another file are identical to what is there."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 9), "same-v1")
    assert not datasets.ingest(write_traces(tmp_path / "b.jsonl", 9), "same-v1").created


def test_a_migration_is_frozen() -> None:
    """The SQL of a migration never changes; a new one is added, with its digest here."""
    frozen = {
        "m001_examples_manifests_members_sources": "b9a59b0e88c5467f3c7af745cd2ccb30",
        "m002_no_tokens": "ceb631869bc2b5344e3118a2152a3b57",
    }
    found = {m.name: canonical.digest(m.sql.encode())[:32] for m in migrations.MIGRATIONS}
    assert found == frozen


def test_an_older_catalog_is_brought_up(doubles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older version stored keeps its key and digest, verifies, and is read."""
    built = datasets.get(doubles)
    shutil.rmtree(paths.snapshot_dir(built.digest))
    added = migrations.Migration("m003_labels", "CREATE TABLE labels (key VARCHAR NOT NULL);")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, added))
    assert datasets.get(doubles) == built  # reading migrates
    with connection.connect(paths.catalog_path(), write=False) as con:
        assert migrations.applied(con)[-1] == "m003_labels"
        assert con.execute("SELECT count(*) FROM labels").fetchall() == [(0,)]
    assert datasets.ready(doubles).digest == built.digest
    assert len(snapshot.read(built.digest)) == 40


def test_gc_takes_only_what_nobody_has(doubles: str) -> None:
    """Unreferenced examples and leftovers go; the dataset stays as it was."""
    tamper(
        "INSERT INTO examples SELECT seq + 1000, 'x' || digest, prompt_digest, split, meta, steps,"
        " characters, canonical FROM examples LIMIT 3"
    )
    left = paths.temporary_dir() / f".scratch-{files._MACHINE}-999999999-abc"
    left.mkdir(parents=True)
    assert store.unreferenced(paths.catalog_path(), remove=False)[0] == 3
    assert [path for path, _ in datasets.leftovers()] == [left]
    assert store.unreferenced(paths.catalog_path(), remove=True)[0] == 3
    assert store.unreferenced(paths.catalog_path(), remove=False)[0] == 0
    assert datasets.verify(doubles).ok
