"""The files that people have: small ones of every kind, and what their author would expect.

python -m tests.files.make FOLDER [TABLE.md]
"""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]
PAIR = "prompt-completion"

PAIRS: Rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(4)]
CHAT: Rows = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Grüße {n}, 世界?"},
            {"role": "assistant", "content": "Ça va."},
        ]
    }
    for n in range(3)
]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "weather", "x": None}}
CALLS: Rows = [
    {
        "messages": [
            {"role": "user", "content": f"Weather {n}?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "look"},
            {"role": "assistant", "content": "Wet."},
        ],
        "tools": [TOOL],
    }
    for n in range(2)
]
TRACES: Rows = [
    {
        "prompt": f"{n}+1?",
        "steps": [{"content": f"{n}+1={n + 1}", "type": "sum"}],
        "answer": str(n + 1),
    }
    for n in range(3)
]


@dataclass(frozen=True)
class File:
    """A file that somebody has."""

    name: str
    data: bytes
    form: str | None  # that auto recognises; None: refused
    examples: int = 0
    says: tuple[str, ...] = ()  # texts that are in the first example as it is shown
    options: dict[str, Any] = field(default_factory=dict)  # of ingest
    why: str = ""  # of a refusal: what the line says


def two(*cells: str, **options: Any) -> bytes:
    """A table of prompts and completions."""
    rows = [list(cells[n : n + 2]) for n in range(0, len(cells), 2)]
    return table([["prompt", "completion"], *rows], **options)


def lines(rows: Rows, **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def table(rows: list[list[str]], **options: Any) -> bytes:
    out = io.StringIO()
    csv.writer(out, **options).writerows(rows)
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    written: bytes = out.getvalue().to_pybytes()
    return written


def parquet(rows: Rows, schema: pa.Schema | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), out)
    return out.getvalue()


def arrow(rows: Rows, new: Callable[..., Any]) -> bytes:
    made = pa.Table.from_pylist(rows)
    out = io.BytesIO()
    with new(out, made.schema) as writer:
        writer.write_table(made)
    return out.getvalue()


def files() -> list[File]:
    """Every file; those with the same stem have the same rows."""
    pair, chat = ("user: What is 0?", "answer: It is 0."), ("user: Grüße 0, 世界?", "Ça va.")
    long = "A long explanation that somebody wrote by hand, word by word."
    made = [
        File("pairs.jsonl", lines(PAIRS), PAIR, 4, pair),
        File("pairs-array.json", json.dumps(PAIRS).encode(), PAIR, 4, pair),
        File("pairs-pretty.json", json.dumps(PAIRS, indent=2).encode(), PAIR, 4, pair),
        File(
            "pairs-objects.json",
            b"\n".join(json.dumps(row, indent=1).encode() for row in PAIRS),
            PAIR,
            4,
            pair,
        ),
        File("pairs-bom.jsonl", b"\xef\xbb\xbf" + lines(PAIRS), PAIR, 4, pair),
        File(
            "pairs-bom-array.json",
            b"\xef\xbb\xbf" + json.dumps(PAIRS).encode(),
            PAIR,
            4,
            pair,
        ),
        File("pairs-blank.jsonl", lines(PAIRS).replace(b"\n", b"\n\n"), PAIR, 4, pair),
        File("pairs-crlf.jsonl", lines(PAIRS).replace(b"\n", b"\r\n"), PAIR, 4, pair),
        File("pairs-no-end.jsonl", lines(PAIRS)[:-1], PAIR, 4, pair),
        File("pairs.ndjson", lines(PAIRS), PAIR, 4, pair),
        File("pairs.jsonl.gz", gzip.compress(lines(PAIRS)), PAIR, 4, pair),
        File("pairs.jsonl.zst", zstd(lines(PAIRS)), PAIR, 4, pair),
        File("pairs.jsonl.bz2", bz2.compress(lines(PAIRS)), PAIR, 4, pair),
        File("pairs.jsonl.xz", lzma.compress(lines(PAIRS)), PAIR, 4, pair),
        File("pairs-array.json.gz", gzip.compress(json.dumps(PAIRS).encode()), PAIR, 4),
        File("pairs.parquet", parquet(PAIRS), PAIR, 4, pair),
        File("pairs-stream.arrow", arrow(PAIRS, pa.ipc.new_stream), PAIR, 4, pair),
        File("pairs-file.arrow", arrow(PAIRS, pa.ipc.new_file), PAIR, 4, pair),
        File("chat.jsonl", lines(CHAT), "messages", 3, chat),
        File("chat-unescaped.jsonl", lines(CHAT, ensure_ascii=False), "messages", 3, chat),
        File("chat.parquet", parquet(CHAT), "messages", 3, chat),
        File(
            "chat-utf16.jsonl",
            lines(CHAT, ensure_ascii=False).decode().encode("utf-16"),
            "messages",
            3,
            chat,
            {"encoding": "utf-16"},
        ),
        File(
            "chat-text-column.csv",
            table([["messages"], *([json.dumps(row["messages"])] for row in CHAT)]),
            "messages",
            3,
            chat,
        ),
        File("calls.jsonl", lines(CALLS), "messages", 2, ("Weather 0?", '"city":"Oslo"', "tools:")),
        File("calls.parquet", parquet(CALLS), "messages", 2, ('"city":"Oslo"', '"look"')),
        File(
            "functions.jsonl",
            lines(
                [
                    {
                        "messages": [
                            {"role": "user", "content": "w?"},
                            {"role": "assistant", "content": "", "function_call": CALL["function"]},
                        ],
                        "functions": [TOOL["function"]],
                    }
                ]
            ),
            "messages",
            1,
            ('"city":"Oslo"', "tools:"),
        ),
        File(
            "sharegpt.json",
            json.dumps(
                [
                    {
                        "id": "x",
                        "conversations": [
                            {"from": "system", "value": "s"},
                            {"from": "human", "value": "hi"},
                            {"from": "gpt", "value": "hello"},
                        ],
                    }
                ]
            ).encode(),
            "messages",
            1,
            ("system: s", "user: hi", "assistant: hello"),
        ),
        File(
            "llamafactory-tools.json",
            json.dumps(
                [
                    {
                        "conversations": [
                            {"from": "human", "value": "weather?"},
                            {
                                "from": "function_call",
                                "value": '{"name": "look", "arguments": {"city": "Oslo"}}',
                            },
                            {"from": "observation", "value": "5"},
                            {"from": "gpt", "value": "5 degrees"},
                        ],
                        "system": "Be exact.",
                        "tools": json.dumps([TOOL]),
                    }
                ]
            ).encode(),
            "messages",
            1,
            ("system: Be exact.", '"city":"Oslo"', "tool: 5", "assistant: 5 degrees"),
        ),
        File(
            "parts.jsonl",
            lines(
                [
                    {
                        "messages": [
                            {"role": "user", "content": [{"type": "text", "text": "a"}]},
                            {"role": "assistant", "content": "b"},
                        ]
                    }
                ]
            ),
            "messages",
            1,
            ("user: a",),
        ),
        File(
            "developer.jsonl",
            lines(
                [
                    {
                        "messages": [
                            {"role": "developer", "content": "d"},
                            {"role": "user", "content": "u"},
                            {"role": "assistant", "content": "a", "weight": 1},
                        ]
                    }
                ]
            ),
            "messages",
            1,
            ("developer: d",),
        ),
        File(
            "thought-field.jsonl",
            lines(
                [
                    {
                        "messages": [
                            {"role": "user", "content": "u"},
                            {"role": "assistant", "content": "a", "reasoning_content": "because"},
                        ]
                    }
                ]
            ),
            "messages",
            1,
            ("reasoning: because",),
        ),
        File(
            "thought-inline.jsonl",
            lines(
                [
                    {
                        "messages": [
                            {"role": "user", "content": "u"},
                            {"role": "assistant", "content": "<think>why</think>a"},
                        ]
                    }
                ]
            ),
            "messages",
            1,
            ("<think>why</think>a",),
        ),
        File(
            "alpaca.json",
            json.dumps(
                [
                    {"instruction": "Answer.", "input": "Order 1 is late.", "output": "Sorry."},
                    {"instruction": "Sing.", "input": "", "output": "La."},
                ],
                indent=4,
            ).encode(),
            "instruction",
            2,
            ("user: Answer.", "Order 1 is late.", "answer: Sorry."),
        ),
        File(
            "alpaca-history.json",
            json.dumps(
                [
                    {
                        "instruction": "and 2?",
                        "input": "",
                        "output": "two",
                        "system": "Count.",
                        "history": [["1?", "one"]],
                    }
                ]
            ).encode(),
            "instruction",
            1,
            ("system: Count.", "assistant: one", "user: and 2?", "assistant: two"),
        ),
        File(
            "alpaca.csv",
            table(
                [
                    ["instruction", "input", "output"],
                    ["Add.", "1, 2", 'It is "3"'],
                    ["Go.", "", "ok"],
                ]
            ),
            "instruction",
            2,
            ("Add.", "1, 2", 'It is "3"'),
        ),
        File(
            "dolly.jsonl",
            lines(
                [
                    {
                        "instruction": "Who?",
                        "context": "Ann wrote it.",
                        "response": "Ann.",
                        "category": "closed_qa",
                    }
                ]
            ),
            "instruction",
            1,
            ("Ann wrote it.", "answer: Ann.", "closed_qa"),
        ),
        File(
            "input-output.jsonl",
            lines([{"input": "a", "output": "b"}]),
            PAIR,
            1,
            ("user: a", "answer: b"),
        ),
        File(
            "problem-solution.jsonl",
            lines([{"problem": "1+1?", "solution": "It is \\boxed{2}.", "answer": "2"}]),
            PAIR,
            1,
            ("user: 1+1?", "\\boxed{2}"),
        ),
        File(
            "squad.jsonl",
            lines(
                [
                    {
                        "id": "5",
                        "title": "T",
                        "context": "The sky is blue.",
                        "question": "What color?",
                        "answers": {"text": ["blue", "Blue"], "answer_start": [11, 11]},
                    }
                ]
            ),
            "question-answer",
            1,
            ("The sky is blue.", "What color?", "answer: blue"),
        ),
        File(
            "squad.parquet",
            parquet(
                [
                    {
                        "context": "The sky is blue.",
                        "question": "What color?",
                        "answers": {"text": ["blue"], "answer_start": [11]},
                    }
                ]
            ),
            "question-answer",
            1,
            ("What color?", "answer: blue"),
        ),
        File(
            "gsm8k.jsonl",
            lines([{"question": "1+2?", "answer": "1+2 = <<1+2=3>>3\n#### 3"}]),
            "question-answer",
            1,
            ("<<1+2=3>>3", "answer: 3"),
        ),
        File(
            "question-code.jsonl",
            lines([{"question": "f?", "answer": "def f():\n    return 1\n#### 1"}]),
            "question-answer",
            1,
            ("    return 1", "answer: 1"),
        ),
        File(
            "text.jsonl", lines([{"text": "Once upon a time."}]), "text", 1, ("Once upon a time.",)
        ),
        File("text.txt", "One line.\n\nÄnother line.\r\n".encode(), "text", 2, ("One line.",)),
        File("text.txt.gz", gzip.compress(b"One line.\nAnother.\n"), "text", 2, ("One line.",)),
        File(
            "latin1.txt",
            "Grüße aus Köln\n".encode("latin-1"),
            "text",
            1,
            ("Grüße aus Köln",),
            {"encoding": "latin-1"},
        ),
        File("traces.jsonl", lines(TRACES), "trace", 3, ("0+1=1", "answer: 1")),
        File("traces.parquet", parquet(TRACES), "trace", 3, ("0+1=1", "answer: 1")),
        File(
            "table.csv",
            two("What, exactly?", 'This, "quoted"'),
            PAIR,
            1,
            ("What, exactly?", 'This, "quoted"'),
        ),
        File(
            "table-lines.csv",
            two("a\nb", "c\r\nd"),
            PAIR,
            1,
            ("a", "b", "d"),
        ),
        File(
            "table-semicolon.csv",
            two("a, b", "c", delimiter=";"),
            PAIR,
            1,
            ("user: a, b", "answer: c"),
        ),
        File(
            "table-bom.csv",
            b"\xef\xbb\xbf" + two("a", "b"),
            PAIR,
            1,
            ("user: a",),
        ),
        File(
            "table.tsv",
            two("a, b", "c", delimiter="\t"),
            PAIR,
            1,
            ("user: a, b",),
        ),
        File(
            "table.csv.gz",
            gzip.compress(two("a", "b")),
            PAIR,
            1,
            ("user: a",),
        ),
        File(
            "table-utf16.csv",
            two("ä", "ö").decode().encode("utf-16"),
            PAIR,
            1,
            ("user: ä", "answer: ö"),
            {"encoding": "utf-16"},
        ),
        File(
            "table-excel.csv",
            table(
                [["prompt", "completion", "id"], ["a", "b", "7"], ["c", "d", ""]],
                quoting=csv.QUOTE_ALL,
            ),
            PAIR,
            2,
            ("user: a", '"id": "7"'),
        ),
        File(
            "renamed.jsonl",
            lines([{"q": "a", "a": "b"}]),
            PAIR,
            1,
            ("user: a", "answer: b"),
            {"mapping": {"prompt": "q", "completion": "a"}},
        ),
        File(
            "joined.jsonl",
            lines([{"title": "T", "body": {"text": "B"}, "reply": "r"}]),
            PAIR,
            1,
            ("T", "B", "answer: r"),
            {"mapping": {"prompt": r"{title}\n\n{body.text}", "completion": "reply"}},
        ),
        File(
            "nested.parquet",
            parquet([{"data": {"question": "q", "answers": ["a", "b"]}}]),
            PAIR,
            1,
            ("user: q", "answer: a"),
            {"mapping": {"prompt": "data.question", "completion": "data.answers.0"}},
        ),
        File(
            "extra-columns.jsonl",
            lines(
                [{"prompt": "p", "completion": "c", "explanation": long, "score": 3, "ok": True}]
            ),
            PAIR,
            1,
            ("user: p", "A long explanation"),
        ),
        File(
            "nan-column.jsonl",
            b'{"prompt": "p", "completion": "c", "score": NaN}\n',
            PAIR,
            1,
            ("user: p",),
        ),
        File(
            "nan-column.parquet",
            parquet([{"prompt": "p", "completion": "c", "score": float("nan")}]),
            PAIR,
            1,
            ("user: p",),
        ),
        File(
            "dates.parquet",
            parquet([{"prompt": "p", "completion": "c", "when": datetime.date(2026, 1, 2)}]),
            PAIR,
            1,
            ("2026-01-02",),
        ),
        File(
            "splits.jsonl",
            lines([PAIRS[0] | {"split": "train"}, PAIRS[1] | {"split": "test"}]),
            PAIR,
            2,
            pair,
        ),
        File(
            "chosen-rejected.jsonl",
            lines([{"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Chair."}]),
            "preference",
            1,
            ("assistant: Apple.", "rejected: Chair."),
        ),
        File(
            "preference-chats.jsonl",
            lines(
                [
                    {
                        "chosen": [
                            {"role": "user", "content": "Name one."},
                            {"role": "assistant", "content": "Apple."},
                        ],
                        "rejected": [
                            {"role": "user", "content": "Name one."},
                            {"role": "assistant", "content": "Chair."},
                        ],
                    }
                ]
            ),
            "preference",
            1,
            ("user: Name one.", "assistant: Apple.", "rejected: Chair."),
        ),
        File(
            "kto.jsonl",
            lines(
                [
                    {"prompt": "q", "completion": "good", "label": True},
                    {"prompt": "q2", "completion": "bad", "label": False},
                ]
            ),
            "preference",
            2,
            ("answer: good", "label: true"),
        ),
        File("empty.jsonl", b"", None, why="holds no"),
        File("cut.jsonl.gz", gzip.compress(lines(PAIRS))[:-9], None, why="cannot read"),
        File("cut.parquet", parquet(PAIRS)[:-20], None, why="cannot read"),
        File("cut.json", json.dumps(PAIRS).encode()[:-20], None, why="cut.json:4"),
        File(
            "quote.csv", two("a", "b") + b'"' + b"x\n" * 600_000, None, why="a quote is not closed"
        ),
        File("ragged.csv", b"prompt,completion\na,b,c\n", None, why="line 2 has 3 cells"),
        File(
            "latin1.jsonl",
            '{"prompt": "ä", "completion": "b"}\n'.encode("latin-1"),
            None,
            why="--encoding latin-1",
        ),
        File("unknown.xlsx", b"PK", None, why="unknown kind of file"),
    ]
    return made


def write(folder: Path) -> list[File]:
    """Write every file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = files()
    for file in made:
        (folder / file.name).write_bytes(file.data)
    return made


def page() -> str:
    """The table for the docs."""
    rows = [
        f"| `{f.name}` | {f.form or 'refused'} | "
        + (f"{f.examples}" if f.form else f"one line: ... {f.why} ...")
        + f" | {_options(f)} |"
        for f in files()
    ]
    head = (
        "# Files that can be ingested\n\nSmall files of the kinds that people have, made by"
        " `tests/files/make.py`, and what\n`datasets ingest` makes of each; the tests hold this"
        " page to it.\n\n| file | recognised as | examples | options |\n|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _options(file: File) -> str:
    given = [f"`--{k} {v}`" for k, v in file.options.items() if k != "mapping"]
    mapping = file.options.get("mapping", {})
    return " ".join([*given, *(f"`--map '{k}={v}'`" for k, v in mapping.items())])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(page(), encoding="utf-8")
