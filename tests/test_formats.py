"""Files that people have become the same examples, whatever form they come in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_mlflow import paths
from tunix_mlflow.data import canonical, datasets, formats, snapshot, writers
from tunix_mlflow.data.catalog import connection, read, store, verify
from tunix_mlflow.data.examples import (
    ROLES,
    Example,
    Message,
    Step,
    canonical_bytes,
    from_canonical,
    prompt_digest,
)
from tunix_mlflow.errors import DatasetError


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def only(path: Path, **options: Any) -> Example:
    """The one example that a file makes."""
    manifest = datasets.ingest(path, "one-v1", **options).manifest
    (example,) = snapshot.read(manifest.digest)
    return example


RECORDS: dict[str, tuple[str, dict[str, Any], Example]] = {
    "trace": (
        "trace",
        {"prompt": "p", "steps": [{"content": "s"}], "answer": "a", "meta": {"k": 1.0}},
        Example(
            messages=(Message(role="user", content="p"),),
            steps=(Step(i=0, content="s"),),
            answer="a",
            meta={"k": 1},
        ),
    ),
    "chat with reasoning": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\n4", "weight": 0},
                {"role": "user", "content": "and 3+3?"},
                {"role": "assistant", "content": "6", "reasoning_content": "3+3=6"},
            ],
            "source": "web",
        },
        Example(
            messages=(
                Message(role="system", content="be brief"),
                Message(role="user", content="2+2?"),
                Message(role="assistant", content="<think>\n2+2=4\n</think>\n\n4", trained=False),
                Message(role="user", content="and 3+3?"),
                Message(role="assistant", content="6", reasoning="3+3=6"),
            ),
            meta={"source": "web"},
        ),
    ),
    "chat with tools": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "sunny", "tool_call_id": "1"},
                {"role": "assistant", "content": "Sunny."},
            ]
        },
        Example(
            messages=(
                Message(role="user", content="weather?"),
                Message(
                    role="assistant",
                    content=None,
                    tool_calls='[{"id":"1","function":{"name":"f","arguments":{}}}]',
                ),
                Message(role="tool", content="sunny", tool_call_id="1"),
                Message(role="assistant", content="Sunny."),
            )
        ),
    ),
    "from and value": (
        "messages",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        Example(
            messages=(Message(role="user", content="hi"), Message(role="assistant", content="ho"))
        ),
    ),
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "p", "completion": "c", "category": "x", "none": None},
        Example(messages=(Message(role="user", content="p"),), answer="c", meta={"category": "x"}),
    ),
    "a thought in the completion": (
        "prompt-completion",
        {"prompt": "p", "completion": "<think>why</think>c"},
        Example(messages=(Message(role="user", content="p"),), answer="<think>why</think>c"),
    ),
    "conversational prompt and completion": (
        "prompt-completion",
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
        Example(
            messages=(Message(role="user", content="p"), Message(role="assistant", content="c"))
        ),
    ),
    "grade school maths": (
        "question-answer",
        {"question": "q", "answer": "He has 2.\nSo 2+2=<<2+2=4>>4.\n#### 4"},
        Example(
            messages=(Message(role="user", content="q"),),
            steps=(Step(i=0, content="He has 2."), Step(i=1, content="So 2+2=<<2+2=4>>4.")),
            answer="4",
        ),
    ),
    "text": (
        "text",
        {"text": "Once upon a time."},
        Example(messages=(Message(role="text", content="Once upon a time."),)),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_record_is_recognised_and_kept(tmp_path: Path, name: str, kind: str) -> None:
    """Every form is told apart, in every kind of file, and becomes the example it means."""
    form, record, expected = RECORDS[name]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(json.dumps(record).encode()))
    else:
        lines(path, record)
    done = datasets.ingest(path, "one-v1")
    assert done.form == form
    (found,) = snapshot.read(done.manifest.digest)
    assert found == expected
    assert datasets.verify("one-v1").ok


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("form", writers.EXPORTS)
def test_what_is_exported_can_be_read(tmp_path: Path, name: str, form: str) -> None:
    """Each form that holds an example holds all that it says; others are refused in one line."""
    _, record, expected = RECORDS[name]
    datasets.ingest(lines(tmp_path / "data.jsonl", record), "one-v1")
    out = tmp_path / "out.jsonl"
    try:
        datasets.export("one-v1", out, form)
    except DatasetError as error:
        assert "use --format" in str(error)
        assert not out.exists()
        assert form in ("trace", "preference") or (form == "text") != (name == "text")
        return
    written = json.loads(out.read_text())
    if form == "gemma":
        assert written["text"].count("<start_of_turn>") == written["text"].count("<end_of_turn>")
        assert (expected.answer or expected.messages[-1].text) in written["text"]
    elif form == "trace":
        datasets.ingest(out, "two-v1")
        (again,) = snapshot.read(datasets.get("two-v1").digest)
        assert again.steps == expected.steps
    elif form == "messages":
        datasets.ingest(out, "two-v1", form="messages")
        (again,) = snapshot.read(datasets.get("two-v1").digest)
        assert again.meta == expected.meta
        if expected.answer is None:
            assert again.messages == expected.messages
        else:
            assert again.messages[-1].content == expected.answer


def test_columns_that_only_later_rows_have(tmp_path: Path) -> None:
    """Parquet holds the tools and meta of every row, whatever the first one has."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turn = {"role": "user", "content": "q"}
    rows = [
        {"messages": [turn, {"role": "assistant", "content": "a"}], "split": "train"},
        {"messages": [turn, call], "tools": [{"name": "f"}], "meta": {"n": 1}, "split": "train"},
    ]
    datasets.ingest(lines(tmp_path / "data.jsonl", *rows), "two-v1")
    datasets.export("two-v1", tmp_path / "out.parquet", "messages")
    again = datasets.ingest(tmp_path / "out.parquet", "two-v2", form="messages")
    assert again.manifest.digest == datasets.get("two-v1").digest


def test_the_name_of_an_export(tmp_path: Path) -> None:
    """It says what kind of file is meant; another is refused, and nothing is written."""
    datasets.ingest(lines(tmp_path / "data.jsonl", {"prompt": "p", "completion": "c"}), "two-v1")
    with pytest.raises(DatasetError, match=r"out.txt: the name has to end in .jsonl"):
        datasets.export("two-v1", tmp_path / "out.txt", "messages")
    assert not (tmp_path / "out.txt").exists()


def test_a_split_that_is_no_name(tmp_path: Path) -> None:
    """The line says where it is, and what a name is."""
    row = {"prompt": "p", "completion": "c", "split": "Test Set"}
    with pytest.raises(DatasetError, match=r"got 'Test Set' - at `\$.split`"):
        only(lines(tmp_path / "data.jsonl", row))


def test_arguments_in_a_map(tmp_path: Path) -> None:
    """A column of maps holds objects."""
    made = {"role": pa.string(), "content": pa.string()}
    arguments = pa.map_(pa.string(), pa.string())
    function = pa.struct({"name": pa.string(), "arguments": arguments})
    calls = pa.list_(pa.struct({"function": function}))
    kind = pa.list_(pa.struct(made | {"tool_calls": calls}))
    said = {"name": "f", "arguments": [("b", "1"), ("a", "2")]}
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": said}]},
    ]
    pq.write_table(pa.table({"messages": pa.array([turns], kind)}), tmp_path / "a.parquet")
    calls_text = only(tmp_path / "a.parquet").messages[-1].tool_calls
    assert calls_text is not None
    assert json.loads(calls_text)[0]["function"]["arguments"] == {"b": "1", "a": "2"}


def test_columns_by_another_name(tmp_path: Path) -> None:
    """--map says where a field stands; errors name the column that the file has."""
    path = lines(tmp_path / "a.jsonl", {"asked": "p", "said": "c", "lang": "en"})
    example = only(path, mapping={"prompt": "asked", "completion": "said"})
    assert (example.prompt, example.answer, example.meta) == ("p", "c", {"lang": "en"})
    with pytest.raises(DatasetError, match="no format fits the columns asked, lang, said"):
        datasets.ingest(path, "two-v1")
    with pytest.raises(DatasetError, match="no column 'nowhere'; it has asked"):
        datasets.ingest(path, "two-v1", mapping={"prompt": "nowhere"})
    with pytest.raises(DatasetError, match="no such field"):
        datasets.ingest(path, "two-v1", mapping={"promt": "asked"})
    bad = lines(tmp_path / "b.jsonl", {"asked": 5, "said": "c"})
    with pytest.raises(DatasetError, match=r"b.jsonl:1: .*\$\.asked"):
        datasets.ingest(bad, "two-v1", mapping={"prompt": "asked", "completion": "said"})


def test_messages_and_tools_as_json_text(tmp_path: Path) -> None:
    """A file with columns may have them as text: they are the same example."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    row = {
        "messages": [{"role": "user", "content": "q"}, call],
        "tools": [{"name": "f", "n": 1.50}],
    }
    text = {key: json.dumps(value) for key, value in row.items()}
    whole = only(lines(tmp_path / "a.jsonl", row))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([text]), path)
    (found,) = snapshot.read(datasets.ingest(path, "two-v1").manifest.digest)
    assert found == whole


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    """Content may be a list of texts, as chat services write it."""
    parts = [{"type": "text", "text": "Sun"}, {"type": "text", "text": "ny."}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    example = only(lines(tmp_path / "a.jsonl", {"messages": turns}))
    assert example.messages[-1].content == "Sunny."


BAD = {
    "no messages": {"messages": []},
    "no assistant last": {"messages": [{"role": "user", "content": "x"}]},
    "a strange role": {"messages": [{"role": "cat", "content": "x"}]},
    "an empty user": {
        "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]
    },
    "an unknown field": {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x", "mood": "good"},
        ]
    },
    "an image": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "marks that disagree": {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x", "weight": 0, "trained": True},
        ]
    },
    "no content": {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_named(tmp_path: Path, name: str) -> None:
    """Line and JSON path are in the message, and nothing is stored."""
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = lines(tmp_path / "chat.jsonl", good, BAD[name], good)
    with pytest.raises(DatasetError, match=r"chat.jsonl:2: not a row of messages: .*\$\.messages"):
        datasets.ingest(path, "bad-v1")
    assert read.listing(paths.catalog_path()) == []


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
messages = st.builds(
    Message,
    role=st.sampled_from(ROLES),
    content=st.none() | texts,
    trained=st.none() | st.booleans(),
    reasoning=st.none(),
    tool_calls=st.none() | st.just('[{"name":"f"}]'),
)
final = st.builds(Message, role=st.just("assistant"), content=texts, reasoning=st.none() | texts)
steps = st.lists(texts.filter(bool), max_size=3).map(
    lambda found: tuple(Step(i=i, content=c) for i, c in enumerate(found))
)
metas = st.dictionaries(
    texts,
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.dictionaries(texts, st.none() | st.integers(0, 9), max_size=2),
    max_size=3,
)
examples = st.builds(
    Example,
    messages=st.lists(messages, min_size=1, max_size=3).map(tuple),
    answer=texts,
    steps=steps,
    meta=metas,
    tools=st.none() | texts,
) | st.builds(
    lambda turns, last, meta, tools: Example(messages=(*turns, last), meta=meta, tools=tools),
    st.lists(messages, max_size=3).map(tuple),
    final,
    metas,
    st.none() | texts,
)


@settings(max_examples=12, deadline=None)
@given(st.lists(examples, min_size=1, max_size=20))
def test_sql_derives_what_python_says(tmp_path_factory: Any, found: list[Example]) -> None:
    """Digest, prompt, steps and characters of any example are the same in both."""
    from tunix_mlflow.data import staging

    path = tmp_path_factory.mktemp("sql") / "catalog.duckdb"
    with staging.new_stage() as stage:
        stage.add_all(found)
        store.ingest(path, stage, "x-v1", {"splits": {"test": 0.1}}, [])
    assert verify.verify(path, "x-v1", None).ok
    with connection.connect(path, write=False) as con:
        rows = con.execute(
            "SELECT digest, prompt_digest, steps, characters, canonical FROM examples"
        ).fetchall()
    assert {row[0] for row in rows} == {canonical.digest(canonical_bytes(e)) for e in found}
    for digest, prompt, count, characters, text in rows:
        example = from_canonical(text)
        assert canonical_bytes(example).decode() == text
        assert canonical.digest(text.encode()) == digest
        assert canonical.encode(json.loads(text)).decode() == text
        assert prompt_digest(example) == prompt
        assert len(example.steps) == count
        contents = [m.text + (m.reasoning or "") for m in example.messages]
        contents += [s.content for s in example.steps] + [example.answer or ""]
        assert sum(map(len, contents)) == characters


def test_recognise_names_the_columns() -> None:
    """What fits no form is said with the way out."""
    with pytest.raises(DatasetError, match=r"columns a, b; .*--map"):
        formats.recognise({"b": 1, "a": 2})


tricky = st.lists(
    st.sampled_from(
        [
            *('"', "\\", ",", ":", "}", "]", "[{", "\\u0022", '","', "é"),
            *(
                ',"messages":[{"content":',
                ',"role":"user"}]',
                ',"steps":[{"content":',
                '"split":"x"',
            ),
        ]
    ),
    min_size=1,
    max_size=4,
).map("".join)
nested = st.fixed_dictionaries(
    {},
    optional={
        "a": tricky,
        "messages": st.just([{"content": "q", "role": "user"}]),
        "split": tricky,
        "steps": st.just([{"content": "c", "i": 0, "type": "t"}]),
    },
)
tricky_examples = st.builds(
    Example,
    messages=st.just((Message(role="user", content="q"),))
    | tricky.map(lambda text: (Message(role="user", content=text),))
    | st.lists(messages, min_size=1, max_size=2).map(tuple)
    | st.just((Message(role="user", content="q", name="n"),)),
    answer=st.none() | tricky,
    steps=st.lists(tricky, max_size=2).map(
        lambda found: tuple(Step(i=i, content=c) for i, c in enumerate(found))
    ),
    split=st.none() | st.just("validation"),
    meta=nested | st.fixed_dictionaries({"m": nested, "z": tricky}) | metas,
)


@settings(max_examples=400, deadline=None)
@given(tricky_examples)
def test_the_trace_form_is_what_a_reader_would_write(example: Example) -> None:
    """The cut text is the trace that the parsed example makes, or there is none to make."""
    text = canonical_bytes(example)
    plain = from_canonical(text)
    (first, *others) = plain.messages
    fits = (
        plain.answer is not None
        and plain.steps
        and not others
        and first == Message(role="user", content=first.text)
        and plain.tools is None
    )
    if not fits:
        with pytest.raises(DatasetError):
            writers.writer("trace")(text, "train")
        return
    found = json.loads(bytes(writers.writer("trace")(text, "train")))
    steps = [{"content": s.content, "i": s.i, "type": s.type} for s in plain.steps]
    wanted = {"prompt": first.content, "steps": steps, "answer": plain.answer, "split": "train"}
    assert found == (wanted | {"meta": plain.meta} if plain.meta else wanted)
