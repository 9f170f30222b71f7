"""What transformers makes of conversations, by the chat templates that trl ships, and by our own.

    python -m tests.templates.peer FOLDER

Runs in the environment of other trainers: `make templates`. Writes one JSON object per template of
trl's: its tokenizer's files, and text, ids and mask of each conversation. The same of the small
templates and tokenizers beside this file is kept, as tests/golden/templates.json.gz.
"""

from __future__ import annotations

import datetime
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.templates.conversations import CONVERSATIONS, TODAY
from tests.templates.own import OWN
from tests.templates.settings import MESSAGES, folders
from tests.templates.small_tokenizers import nasty_texts, small_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden" / "templates.json.gz"

_SPECIAL = re.compile(
    "<[|\uff5c][^<>|\uff5c\n{}']{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|pad)>|<(?:start|end)_of_turn>"
)
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>"),
    *(
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|return|>",
        "<end_of_utterance>",
        "<turn|>",
        "<|eot|>",
    ),
)


def tokenizer(source: str) -> tuple[str, dict[str, str]]:
    """A small byte-level tokenizer that knows the template's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("l", "l"), ("i", "s"), ("Ċ", "Ċ"), ("a", "s"), ("o", "o")]
    vocabulary = {t: n for n, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = sorted({*_SPECIAL.findall(source), "<s>", "</s>"})
    extra = [t for t in ("<|turn>", "<turn|>", "<end_of_utterance>") if t in source]
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in dict.fromkeys([*found, *extra])]
    )
    known = [*found, *extra]
    end = next((t for t in _ENDS if t in known), "</s>")
    return made.to_str(), {"bos_token": "<s>", "eos_token": end, "chat_template": source}


def loaded(backend: str, bos: str, eos: str) -> Any:
    """Transformers' tokenizer of a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.json").write_text(backend)
        return PreTrainedTokenizerFast(
            tokenizer_file=f"{scratch}/tokenizer.json", bos_token=bos, eos_token=eos
        )


def rendered(backend: str, settings: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Text, ids and mask of conversations, or why there are none."""
    source = settings["chat_template"]
    made = loaded(backend, settings["bos_token"], settings["eos_token"])
    marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
    results: dict[str, Any] = {}
    for name in names:
        messages, tools = CONVERSATIONS[name]
        given: dict[str, Any] = {"tools": tools, "chat_template": source}
        try:
            text = made.apply_chat_template(messages, tokenize=False, **given)
            found = made.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=marked, **given
            )
        except Exception as error:  # jinja's, and whatever a template's code raises
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        results[name] = {"text": text, "ids": list(found["input_ids"])}
        if marked:
            results[name]["mask"] = [int(i) for i in found["assistant_masks"]]
    return results


def golden() -> dict[str, Any]:
    """Ids and masks of the small templates and tokenizers."""
    backends = small_tokenizers()
    made: dict[str, Any] = {"tokenizers": backends, "templates": {}, "texts": {}}
    for template, source in OWN.items():
        for number, (name, backend) in enumerate(backends.items()):
            settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": source}
            # Every conversation with the first tokenizer, a few with each of the others.
            names = [n for i, n in enumerate(CONVERSATIONS) if not number or i % 4 == number % 4]
            made["templates"].setdefault(template, {})[name] = rendered(backend, settings, names)
    for name, backend in backends.items():
        theirs = loaded(backend, "<s>", "<|im_end|>")
        made["texts"][name] = [theirs.encode(t, add_special_tokens=False) for t in nasty_texts()]
    made["settings"] = {
        way: by_settings(files) for way, files in folders(backends["byte-level"]).items()
    }
    return made


def by_settings(files: dict[str, str]) -> list[int]:
    """Ids of a conversation, by the tokenizer that transformers reads from a folder."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_text(content)
        found = AutoTokenizer.from_pretrained(scratch).apply_chat_template(
            MESSAGES, return_dict=True
        )
    return list(found["input_ids"])


def main(folder: Path) -> None:
    import transformers
    import transformers.utils.chat_template_utils as utils
    import trl

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromisoformat(TODAY)

    utils.datetime = Fixed
    GOLDEN.write_bytes(gzip.compress(json.dumps(golden()).encode(), mtime=0))
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "trl": trl.__version__}
    (folder / "versions.json").write_text(json.dumps(versions))
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        backend, settings = tokenizer(path.read_text())
        out = {
            "template": path.stem,
            "files": {"tokenizer.json": backend, "tokenizer_config.json": json.dumps(settings)},
            "results": rendered(backend, settings, list(CONVERSATIONS)),
        }
        (folder / f"{path.stem}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
