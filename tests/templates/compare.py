"""Compare what peer.py wrote with what a model would be trained on, and write a table.

python tests/templates/compare.py FOLDER [TABLE.md]
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

from tests.templates.conversations import CONVERSATIONS
from tests.templates.words import REFUSED, conversation, wrong
from tunix_mlflow.config.schema import DataConfig, LimitsConfig
from tunix_mlflow.data import formats
from tunix_mlflow.data.examples import Example, canonical_text, from_canonical
from tunix_mlflow.errors import TunixMlflowError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

_CHATS = 100
EQUAL, MISSING, DIFFERS = "equal", "refused", "DIFFERS"
NEITHER, ONLY_HERE, ONLY_THERE = "neither", "only here", "only there"
_HEAD = """# Chat templates

What training makes of the chat templates that trl {trl} ships, against transformers
{transformers}, for {count} conversations: single and multi-turn, with system, tools, calls with
null content, thoughts in the content and in a field, two turns of the assistant in a row, non-
ASCII, leading newlines. Of the {pairs} pairs that transformers renders, the ids differ in
{differ}; where a template marks generations, so does the mask. `make templates` writes this page.

Of {chats} random conversations in which no word occurs twice, times the templates, {trained} can
be trained on. In {wrong} of them a word of the assistant is left out, or one of anybody else is
trained on.

A pair is refused, unless `data.fidelity=record`, when the text of a turn that is trained on is
not in what the template wrote, or no end token follows it. The tokenizers are small ones with
each template's own special tokens; a model's generation_config.json may name more ends.

| template | rendered | trained on | refused | since these are missing |
|---|---|---|---|---|
"""


def example(name: str) -> Example:
    """A conversation, as ingest reads it from JSONL and the catalog keeps it."""
    messages, tools = CONVERSATIONS[name]
    row = json.loads(json.dumps({"messages": messages, "tools": tools}))
    read = formats.reader("messages", LimitsConfig(), {}, None, has_columns=False)
    return from_canonical(canonical_text(read(row)))


def outcome(tokenizer: HubTokenizer, name: str, theirs: dict[str, Any]) -> tuple[str, str]:
    """How a conversation comes out here and there, and why if it cannot be trained on."""
    try:
        ids, trained, findings = tokenizer.encode_example(example(name), DataConfig())
    except TunixMlflowError as error:
        return (NEITHER, "") if "error" in theirs else (ONLY_THERE, str(error))
    if "error" in theirs:
        return ONLY_HERE, theirs["error"]
    if ids.tolist() != theirs["ids"]:
        return DIFFERS, "ids"
    if "mask" in theirs and trained.astype(int).tolist() != theirs["mask"]:
        return DIFFERS, "mask"
    missing = sorted({finding.kind for finding in findings if finding.refuses})
    return (MISSING, ", ".join(missing)) if missing else (EQUAL, "")


def main(folder: Path, page: Path) -> int:
    """Compare all, write the page, and return the number of pairs that differ."""
    counts: collections.Counter[str] = collections.Counter()
    chats: collections.Counter[str] = collections.Counter()
    rows = []
    versions = json.loads((folder / "versions.json").read_text())
    for path in sorted(folder.glob("*.json")):
        if path.name == "versions.json":
            continue
        peer = json.loads(path.read_text())
        files = {name: text.encode() for name, text in peer["files"].items()}
        tokenizer = HubTokenizer(files, peer["template"])
        found = {n: outcome(tokenizer, n, theirs) for n, theirs in peer["results"].items()}
        own = collections.Counter(kind for kind, _ in found.values())
        why = collections.Counter(
            part for kind, text in found.values() if kind == MISSING for part in text.split(", ")
        )
        for name, (kind, text) in found.items():
            if kind not in (EQUAL, NEITHER, MISSING):
                print(peer["template"], name, kind, text, sep=" | ")
        for number in range(_CHATS):
            verdict = wrong(tokenizer, conversation(number), DataConfig())
            if verdict not in (None, REFUSED):
                print(peer["template"], "conversation", number, verdict, sep=" | ")
            chats[EQUAL if verdict is None else verdict if verdict == REFUSED else DIFFERS] += 1
        shown = ", ".join(f"{part} ({count})" for part, count in why.most_common())
        rendered = own[EQUAL] + own[MISSING] + own[DIFFERS] + own[ONLY_THERE]
        rows.append(
            f"| {peer['template']} | {rendered} | {own[EQUAL]} | {own[MISSING]} | {shown} |"
        )
        counts += own
    differ = counts[DIFFERS] + counts[ONLY_HERE] + counts[ONLY_THERE]
    pairs = counts.total() - counts[NEITHER] - counts[ONLY_HERE]
    head = _HEAD.format(
        count=len(CONVERSATIONS),
        pairs=f"{pairs:,}",
        differ=differ,
        chats=_CHATS,
        trained=f"{chats[EQUAL] + chats[DIFFERS]:,}",
        wrong=chats[DIFFERS] or "none",
        **versions,
    )
    page.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(dict(counts))
    return differ + chats[DIFFERS]


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1]), Path(sys.argv[2])) else 0)
