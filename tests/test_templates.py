"""Rendered, tokenized and masked as transformers does, by templates and tokenizers of every kind.

The golden file is made in the environment of other trainers, by `make templates`.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.templates.compare import example
from tests.templates.conversations import CONVERSATIONS
from tests.templates.own import OWN
from tests.templates.settings import MESSAGES, folders
from tests.templates.small_tokenizers import nasty_texts, small_tokenizers
from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer
from tunix_mlflow.text.mask import is_trained

GOLDEN = Path(__file__).parent / "golden" / "templates.json.gz"
TOKENIZERS = list(small_tokenizers())


@cache
def golden() -> Any:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


@cache
def made(kind: str, template: str | None) -> HubTokenizer:
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    if template is not None:
        settings["chat_template"] = OWN[template]
    files = {
        "tokenizer.json": golden()["tokenizers"][kind].encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return HubTokenizer(files, "the model")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", OWN)
def test_ids_and_masks(template: str, kind: str) -> None:
    """The ids are transformers'; where a template marks generations, so is the mask; elsewhere
    each turn that is trained on is, from its first character to its end, and nothing else is."""
    tokenizer = made(kind, template)
    theirs = golden()["templates"][template][kind]
    assert theirs
    for name, expected in theirs.items():
        if "error" in expected:
            with pytest.raises(DatasetError):
                tokenizer.encode_example(example(name), DataConfig())
            continue
        ids, trained, findings = tokenizer.encode_example(example(name), DataConfig())
        assert ids.tolist() == expected["ids"], name
        if "mask" in expected:
            assert trained.astype(int).tolist() == expected["mask"], name
            continue
        if any(finding.kind not in ("prompt", "white space") for finding in findings):
            continue
        text = " ".join(tokenizer.decode(ids[trained], skip_special_tokens=False).split())
        rest = " ".join(tokenizer.decode(ids[~trained], skip_special_tokens=False).split())
        for message in example(name).messages:
            said = " ".join(message.text.split())
            if is_trained(message):
                assert said in text or kind.startswith("unigram"), (name, said, text)
            elif said and kind == "byte-level":
                assert said in rest
                assert said not in text


@pytest.mark.parametrize("way", folders(small_tokenizers()["byte-level"]))
def test_settings_that_change_ids(way: str) -> None:
    """Tokens and flags that stand beside tokenizer.json count, as for transformers."""
    files = folders(golden()["tokenizers"]["byte-level"])[way]
    tokenizer = HubTokenizer({name: text.encode() for name, text in files.items()}, "the model")
    row = Example(messages=tuple(Message(**message) for message in MESSAGES))
    ids = tokenizer.encode_example(row, DataConfig()).ids
    assert ids.tolist() == golden()["settings"][way]


def test_settings_that_are_refused() -> None:
    """Special tokens that are split, and a token that has another id in tokenizer.json."""
    files = folders(small_tokenizers()["byte-level"])["a new token"]
    settings = json.loads(files["tokenizer_config.json"])
    other = {str(int(i) + 2): t for i, t in settings["added_tokens_decoder"].items()}
    for change, message in (
        ({"split_special_tokens": True}, "split_special_tokens in tokenizer_config.json"),
        ({"added_tokens_decoder": other}, "the token '<s>' the id"),
        ({"added_tokens_decoder": {"x": {}}}, "is damaged"),
    ):
        changed = files | {"tokenizer_config.json": json.dumps(settings | change)}
        with pytest.raises(ModelError, match=message):
            HubTokenizer({name: text.encode() for name, text in changed.items()}, "the model")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_nasty_texts(kind: str) -> None:
    """The same ids for texts that trip tokenizers; each is trained on from beginning to end."""
    tokenizer = made(kind, None)
    bos, end = (tokenizer._tokenizer.token_to_id(t) for t in ("<s>", "<|im_end|>"))
    for text, expected in zip(nasty_texts(), golden()["texts"][kind], strict=True):
        row = Example(messages=(Message(role="text", content=text),))
        ids, trained, _ = tokenizer.encode_example(row, DataConfig())
        assert ids.tolist() == [bos, *expected, end], text
        assert trained.tolist() == [False, *[True] * len(expected), True]


def test_every_conversation_is_tried() -> None:
    """At least sixteen, with every template, and by every kind of tokenizer."""
    assert len(CONVERSATIONS) >= 16
    assert golden()["tokenizers"] == small_tokenizers()
    for template in OWN:
        tried = golden()["templates"][template]
        assert set(tried["byte-level"]) == set(CONVERSATIONS)
        assert set(tried) == set(TOKENIZERS)


def test_where_turns_begin_is_not_decided_by_characters_that_merge() -> None:
    """A token of which one character is trained on is trained on as a whole."""
    tokenizer = made("byte-level", "turns")
    row = Example(
        messages=(Message(role="user", content="q"), Message(role="assistant", content="\n\nx"))
    )
    ids, trained, findings = tokenizer.encode_example(row, DataConfig())
    assert tokenizer.decode(ids[trained], skip_special_tokens=False) == "\n\n\nx<|im_end|>"
    assert [finding.kind for finding in findings] == ["prompt"]
    assert not np.array_equal(
        ids[: len(tokenizer.encode_prompt(row, DataConfig()))],
        tokenizer.encode_prompt(row, DataConfig()),
    )
