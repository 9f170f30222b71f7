"""The catalog: what is stored is what the manifest says, or it is named."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import write_traces
from tunix_mlflow import paths
from tunix_mlflow.config.schema import LimitsConfig
from tunix_mlflow.data import canonical, datasets, parsing, snapshot, sources, staging
from tunix_mlflow.data.catalog import connection, migrations, read, store
from tunix_mlflow.data.examples import ReasoningTrace, canonical_bytes
from tunix_mlflow.data.manifest import Selection, parse_key
from tunix_mlflow.errors import DatasetError, IntegrityError, Refused
from tunix_mlflow.files import sha256_file


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
    with pytest.raises(Refused, match="not what its manifest says"):
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
    "": "empty line",
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


def test_export_reads_back_to_the_same_digest(doubles: str, tmp_path: Path) -> None:
    """export and ingest are inverse: splits aside, which the file now states itself."""
    manifest = datasets.seed("column-addition-v1", num_traces=300, name="sums-v1").manifest
    assert datasets.export("sums-v1", tmp_path / "out.jsonl") == 300
    again = datasets.ingest(tmp_path / "out.jsonl", "again-v1").manifest
    assert again.digest == manifest.digest
    assert again.splits == manifest.splits


def test_build_filters_limits_and_selects(doubles: str) -> None:
    """Filters match value and type; latest is newest first; random is a function of its seed."""
    even = datasets.build("even-v1", Selection(filters={"parity": "even"})).manifest
    assert even.count == 20
    one = datasets.build("one-v1", Selection(filters={"n": 7})).manifest
    assert one.count == 1
    with pytest.raises(DatasetError, match="no example"):
        datasets.build("none-v1", Selection(filters={"n": "7"}))
    latest = datasets.build("latest-v1", Selection(limit=3)).manifest
    prompts = {e.prompt for e in snapshot.read(latest.digest)}
    assert prompts == {"Double 37", "Double 38", "Double 39"}

    def chosen(key: str, seed: int) -> str:
        return datasets.build(key, Selection(order="random", seed=seed, limit=10)).manifest.digest

    assert chosen("r1-v1", 1) == chosen("r1-v2", 1) != chosen("r2-v1", 2)


@pytest.mark.parametrize("key", ["a'b", 'a"b', "", "$.n", "a.b", "x" * 200, "n\x00", "é"])
def test_a_filter_key_is_a_plain_word(doubles: str, key: str) -> None:
    """Nothing but a word reaches the JSON path."""
    with pytest.raises(DatasetError, match="filter key"):
        datasets.build("x-v1", Selection(filters={key: "1"}))


@pytest.mark.parametrize("value", ["' OR 1=1 --", "\\", '"', "%", "\ud800", 2**60, None, [1]])
def test_a_filter_value_is_only_compared(doubles: str, value: object) -> None:
    """No value is anything but a value."""
    with pytest.raises(DatasetError, match=r"no example|filter n"):
        datasets.build("x-v1", Selection(filters={"n": value}))


@pytest.mark.parametrize("key", ["golden", "golden-2", "-v1", "Golden-v1", "a/b-v1", "a-v1-", ""])
def test_a_key_is_name_and_version(key: str) -> None:
    """Anything else is refused before the catalog is opened."""
    with pytest.raises(DatasetError, match="not a dataset key"):
        datasets.get(key)


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


def test_export_leaves_nothing_half_written(doubles: str, tmp_path: Path) -> None:
    """A folder, or a place that is not there, is one line."""
    (tmp_path / "out").mkdir()
    for target in (tmp_path / "out", tmp_path / "absent" / "x.jsonl"):
        with pytest.raises(DatasetError, match="cannot write"):
            datasets.export(doubles, target)
    assert not list(tmp_path.glob(".*"))


def test_a_prompt_keeps_to_one_split(tmp_path: Path) -> None:
    """Own splits that disagree are refused by id; an example without one joins its prompt's."""
    path = tmp_path / "leak.jsonl"
    line = {"prompt": "p", "steps": [{"content": "s"}], "answer": "a"}
    lines = [line | {"split": "train"}, line | {"split": "test", "answer": "b"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(DatasetError, match="same prompt is in the splits 'test' and 'train'"):
        datasets.ingest(path, "leak-v1")
    lines = [line, line | {"split": "test", "answer": "b"}, line | {"prompt": "other"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    splits = datasets.ingest(path, "joined-v1").manifest.splits
    assert {name: split.count for name, split in splits.items()} == {"test": 2, "train": 1}


def test_the_name_of_a_file_is_no_part_of_a_dataset(tmp_path: Path) -> None:
    """The same traces from another file are identical to what is there."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 9), "same-v1")
    assert not datasets.ingest(write_traces(tmp_path / "b.jsonl", 9), "same-v1").created


def test_a_migration_is_frozen() -> None:
    """The SQL of a migration never changes; a new one is added, with its digest here."""
    frozen = {"m001_examples_manifests_members_sources": "b9a59b0e88c5467f3c7af745cd2ccb30"}
    found = {m.name: canonical.digest(m.sql.encode())[:32] for m in migrations.MIGRATIONS}
    assert found == frozen


def test_an_older_catalog_is_brought_up(doubles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older version stored keeps its key and digest, verifies, and is read."""
    built = datasets.get(doubles)
    shutil.rmtree(paths.snapshot_dir(built.digest))
    added = migrations.Migration("m002_labels", "CREATE TABLE labels (key VARCHAR NOT NULL);")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, added))
    assert datasets.get(doubles) == built  # reading migrates
    with connection.connect(paths.catalog_path(), write=False) as con:
        assert migrations.applied(con)[-1] == "m002_labels"
        assert con.execute("SELECT count(*) FROM labels").fetchall() == [(0,)]
    assert datasets.ready(doubles).digest == built.digest
    assert len(snapshot.read(built.digest)) == 40


def test_filters_compare_by_type_and_operator(doubles: str) -> None:
    """Ranges, lists, negations and combinations; a key that is absent meets a negation."""

    def count(**filters: object) -> int:
        key = f"f-v{len(read.listing(paths.catalog_path()))}"
        return datasets.build(key, Selection(filters=filters)).manifest.count

    assert count(n={"ge": 10, "lt": 13}) == 3
    assert count(n={"in": [1, 2, 99]}, parity="odd") == 1
    assert count(n={"not_in": list(range(38))}) == 2
    assert count(parity={"ne": "even"}) == 20
    assert count(nowhere={"ne": "x"}) == 40
    assert count(n={"gt": 36.5}) == 3
    for bad in ({"like": "a"}, {"in": []}, {"in": "x"}, {"lt": True}, {"eq": None}):
        with pytest.raises(DatasetError, match="filter n"):
            count(n=bad)


def test_named_fractions_and_parents(tmp_path: Path) -> None:
    """Splits by prompt hash nest as they grow; a child knows its parent, and keeps its splits."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 400), "base-v1")
    shares = {"test": 0.2, "validation": 0.1}
    parent = datasets.build("parent-v1", Selection(order="all", splits=shares)).manifest
    assert set(parent.splits) == {"train", "validation", "test"}
    assert 50 < parent.splits["test"].count < 110
    asked = Selection(parent="parent-v1", filters={"parity": "even"}, splits=shares)
    child = datasets.build("child-v1", asked).manifest
    assert child.parent == f"parent-v1@{parent.digest}"
    assert child.count == 200
    assert datasets.verify("child-v1").ok
    for bad in ({"test": 1.5}, {"test": 0.6, "dev": 0.6}, {"Test": 0.1}, {"test": float("nan")}):
        with pytest.raises(DatasetError, match="split"):
            datasets.build("bad-v1", Selection(splits=bad))


def split_of(key: str) -> dict[str, str]:
    """Prompt -> the split it is in."""
    splits = datasets.get(key).splits
    found = snapshot.read_splits(datasets.get(key).digest, list(splits))
    return {e.prompt: name for name, part in found.items() for e in part}


def test_data_without_splits_gets_three(tmp_path: Path) -> None:
    """By ingest, and a prompt keeps its split when the dataset grows."""
    small = datasets.ingest(write_traces(tmp_path / "a.jsonl", 300), "small-v1").manifest
    assert 10 < small.splits["validation"].count < 60
    assert 10 < small.splits["test"].count < 60
    assert "validation_from_train" not in small.stats
    datasets.ingest(write_traces(tmp_path / "b.jsonl", 600), "large-v1")
    assert split_of("small-v1").items() <= split_of("large-v1").items()


def test_validation_is_taken_from_train_and_said(tmp_path: Path) -> None:
    """Where the data has splits but no validation: a tenth of train by prompt, never of test."""

    def ingest(key: str, count: int, **more: Any) -> datasets.Ingested:
        parts = [
            f"{name}={write_traces(tmp_path / f'{name}.jsonl', n, start=start)}"
            for name, n, start in (("train", count, 0), ("test", 50, 9_000))
        ]
        return datasets.ingest(parts, key, **more)

    done = ingest("own-v1", 300)
    counts = {name: split.count for name, split in done.manifest.splits.items()}
    assert counts["test"] == 50
    assert counts["train"] + counts["validation"] == 300
    assert 10 < counts["validation"] < 60
    assert done.validation_from_train == counts["validation"]
    assert datasets.verify("own-v1").ok
    ingest("own-v2", 600)
    assert split_of("own-v1").items() <= split_of("own-v2").items()
    none = ingest("own-v3", 300, splits={"validation": 0.0})
    assert set(none.manifest.splits) == {"train", "test"}
    only_train = datasets.ingest(write_traces(tmp_path / "a.jsonl", 99, split="train"), "t-v1")
    assert set(only_train.manifest.splits) == {"train", "validation"}
    tiny = datasets.ingest(write_traces(tmp_path / "b.jsonl", 1, split="train"), "tiny-v1")
    assert set(tiny.manifest.splits) == {"train"}
    # An export has the splits; without its validation, train is not where the hash says.
    datasets.ingest(write_traces(tmp_path / "c.jsonl", 300), "three-v1")
    datasets.export("three-v1", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(r) + "\n" for r in rows if r["split"] != "validation")
    (tmp_path / "two.jsonl").write_text(kept)
    assert datasets.ingest(tmp_path / "two.jsonl", "two-v1").validation_from_train > 10


def test_a_child_keeps_the_splits_of_its_parent(tmp_path: Path) -> None:
    """Whatever shares it asks for: no prompt of the parent's test is trained on."""
    datasets.ingest(write_traces(tmp_path / "a.jsonl", 200), "p-v1", splits={"test": 0.5})
    datasets.build("c-v1", Selection(parent="p-v1", filters={"parity": "odd"}))
    parent, child = split_of("p-v1"), split_of("c-v1")
    assert len(child) == 100
    assert {p for p, s in child.items() if s == "test"} == {p for p in child if parent[p] == "test"}
    assert {"train", "validation", "test"} == set(child.values())
    assert datasets.verify("c-v1").ok
    tamper("UPDATE members SET split = 'test' WHERE key = 'c-v1' AND split = 'validation'")
    shutil.rmtree(paths.snapshot_dir(datasets.get("c-v1").digest))
    assert len(datasets.verify("c-v1").split_drift) == list(child.values()).count("validation")


def test_load_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A key, a digest, a file, files by split; verified, with a snapshot, and nothing printed."""
    seeded = datasets.load_dataset("golden-v1")
    assert datasets.load_dataset(seeded.digest) == seeded
    path = write_traces(tmp_path / "a.jsonl", 40)
    one = datasets.load_dataset(path, key="mine-v1", form="trace")
    assert (one.key, one.count) == ("mine-v1", 40)
    assert datasets.load_dataset(str(path), key="mine-v1", form="trace") == one
    two = datasets.load_dataset([f"train={path}", f"test={tmp_path}/b.jsonl"][:1], key="mine-v2")
    assert "train" in two.splits
    assert len(snapshot.read(one.digest)) == 40
    for bad in (lambda: datasets.load_dataset(path), lambda: datasets.load_dataset("nowhere-v1")):
        with pytest.raises(DatasetError):
            bad()
    with pytest.raises(DatasetError, match="form need key"):
        datasets.load_dataset("golden-v1", form="trace")
    tamper("DELETE FROM examples WHERE canonical LIKE '%Double 7\"%'")
    with pytest.raises(Refused, match="missing"):
        datasets.load_dataset("mine-v1")
    assert capfd.readouterr() == ("", "")


def test_a_snapshot_is_hashed_once(doubles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying, reading and comparing hash each file and each example once; a change is seen."""
    digest = datasets.get(doubles).digest
    hashed: list[Path] = []
    monkeypatch.setattr(
        snapshot, "sha256_file", lambda path: (hashed.append(path), sha256_file(path))[1]
    )
    manifest = datasets.ready(doubles)
    both = snapshot.read_splits(digest, ["train", "validation", "absent"])
    assert both == {
        "train": snapshot.read(digest, "train"),
        "validation": snapshot.read(digest, "validation"),
        "absent": [],
    }
    datasets.check_leakage(manifest, "train", manifest, "test")
    datasets.ready(digest)
    assert len(hashed) == len(set(hashed)) > 0
    path = paths.snapshot_dir(digest) / "examples-00000.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert datasets.verify(doubles).notes == [f"snapshot drift: {path.name}"]


def test_diff_pairs_what_shares_a_prompt(tmp_path: Path) -> None:
    """Added, removed, changed and moved, each by digest."""
    path = write_traces(tmp_path / "a.jsonl", 6, split="train")
    datasets.ingest(path, "a-v1")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["answer"] = "another"
    records[1]["prompt"] = "a new question"
    path.write_text("".join(json.dumps(r) + "\n" for r in records[:5]))
    datasets.ingest(path, "a-v2")
    found = datasets.diff("a-v1", "a-v2")
    assert [len(kind) for kind in found] == [1, 2, 1, 0]
    assert datasets.diff("a-v1", "a-v1") == ([], [], [], [])


def test_gc_takes_only_what_nobody_has(doubles: str) -> None:
    """Unreferenced examples and leftovers go; the dataset stays as it was."""
    tamper(
        "INSERT INTO examples SELECT seq + 1000, 'x' || digest, prompt_digest, split, meta, steps,"
        " characters, tokens, canonical FROM examples LIMIT 3"
    )
    left = paths.temporary_dir() / "stage-999999999-abc"
    left.mkdir(parents=True)
    assert store.unreferenced(paths.catalog_path(), remove=False)[0] == 3
    assert [path for path, _ in datasets.leftovers()] == [left]
    assert store.unreferenced(paths.catalog_path(), remove=True)[0] == 3
    assert store.unreferenced(paths.catalog_path(), remove=False)[0] == 0
    assert datasets.verify(doubles).ok
