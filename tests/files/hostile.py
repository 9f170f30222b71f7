"""Files that mean harm, or are broken in ways that cost time or memory; each small on the disk."""

from __future__ import annotations

import gzip
import random

_NOISE = random.Random(0).randbytes(20_000)
_ROW = b'{"prompt":"p","completion":"c",'


def files() -> dict[str, bytes]:
    """Name -> content; none of them can be ingested."""
    return {
        "deep.jsonl": b'{"prompt":"p","completion":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "deep-array.json": b"[" * 1_000_000,
        "deep-objects.json": b'{"a":' * 200_000,
        "backslashes.json": b'[{"prompt":"' + b"\\" * 1_000_001 + b'"}]',
        "no-end.json": b'[{"prompt":"' + b"a" * 3_000_000,
        "many-digits.jsonl": _ROW + b'"n":' + b"9" * 5_000 + b"}\n",
        "infinite.jsonl": _ROW + b'"n":1e999999999}\n',
        "surrogate.jsonl": b'{"prompt":"\\ud800","completion":"c"}\n',
        "nul.csv": b"prompt,completion\na\0b,c\n",
        "columns.csv": ",".join(f"c{n}" for n in range(200_000)).encode() + b"\n",
        "quotes.csv": b'"' * 1_000_000,
        "inflates.jsonl.gz": gzip.compress(b"a" * 100_000_000),
        "inflates.csv.gz": gzip.compress(b'prompt,completion\n"' + b"a" * 100_000_000),
        "inflates.json.gz": gzip.compress(b'[{"a":"' + b"a" * 100_000_000),
        "noise.jsonl": _NOISE,
        "noise.json": b"[" + _NOISE,
        "noise.csv": _NOISE,
        "noise.jsonl.gz": _NOISE,
        "noise.jsonl.zst": _NOISE,
        "noise.jsonl.bz2": _NOISE,
        "noise.jsonl.xz": _NOISE,
        "noise.parquet": b"PAR1" + _NOISE + b"PAR1",
        "noise.arrow": _NOISE,
        "noise.txt": _NOISE,
        "a-number.json": b"123",
        "nulls.json": b"[null, null]",
        "white-space.json": b"   \n\n ",
        "a-header.csv": b"prompt,completion\n",
    }
