"""What is trained on of each turn, by templates that write conversations in other ways."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.templates.own import OWN
from tests.templates.small_tokenizers import small_tokenizers
from tests.templates.words import REFUSED, conversation, wrong
from tests.test_fidelity import chat, files, read
from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import select_turns
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen 3.5 and others: a thought is opened for the last turn alone, and calls are text.
OPENS = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' %}{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ (m.content or '').split('</think>')[-1].lstrip('\\n') }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ENDS_ONCE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|stop|>"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)
COUNTS = (
    "{{ messages | length }} turns\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|stop|>\n{% endfor %}" + HEAD
)
TOOLS_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == messages[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|stop|>"
    "{% endif %}{% endfor %}"
)
REPLY_WITHIN = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% elif m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}"
    "</call>{% endfor %}{% for r in messages %}{% if r.role == 'tool' and m.tool_calls %}"
    "<reply>{{ r.content }}</reply>{% endif %}{% endfor %}{{ m.content or '' }}<|stop|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|stop|>\n{% endif %}{% endfor %}" + HEAD
)
ENDS_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|stop|>\n"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>\n{% endfor %}"
    "{% endfor %}" + HEAD
)
ODD = {
    "opens a thought for the last turn": OPENS,
    "ends once": ENDS_ONCE,
    "counts": COUNTS,
    "tools in the last turn": TOOLS_LAST,
    "a reply within a turn": REPLY_WITHIN,
    "a call after the end": ENDS_FIRST,
}
CALL: dict[str, Any] = {
    "content": "",
    "tool_calls": [{"function": {"name": "look", "arguments": {"t": "Oslo"}}}],
}


def tokenizer(template: str, kind: str = "byte-level") -> HubTokenizer:
    return HubTokenizer(files(template, kind), "the model")


def spans(template: str, row: dict[str, Any], **data: Any) -> list[str]:
    """The stretches that are trained on."""
    made = tokenizer(template)
    ids, trained, _ = made.encode_example(read(row), DataConfig(**data))
    stretches: list[list[int]] = []
    before = False
    for token, is_trained in zip(ids.tolist(), trained.tolist(), strict=True):
        if is_trained:
            stretches = [*stretches, [token]] if not before else stretches
            stretches[-1] += [token] if before else []
        before = is_trained
    return [made.decode(stretch, skip_special_tokens=False) for stretch in stretches]


def refusals(template: str, row: dict[str, Any], **data: Any) -> list[tuple[str, int]]:
    found = tokenizer(template).encode_example(read(row), DataConfig(**data)).findings
    return [(f.kind, f.turn) for f in found if f.refuses]


@pytest.mark.parametrize("data", [{}, {"turns": "last"}], ids=str)
@pytest.mark.parametrize("template", [*OWN, *ODD])
def test_a_turn_is_trained_on_and_nothing_else(template: str, data: dict[str, Any]) -> None:
    """Of random conversations in which no word occurs twice: or they are refused."""
    end = "<|im_end|>" if template in OWN else "<|stop|>"
    settings = {"eos_token": end, "chat_template": (OWN | ODD)[template], "bos_token": "<s>"}
    made = HubTokenizer(
        {
            "tokenizer.json": small_tokenizers()["byte-level"].encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
        },
        "the model",
    )
    found = [wrong(made, conversation(number), DataConfig(**data)) for number in range(40)]
    assert {f for f in found if f not in (None, REFUSED)} == set()


@pytest.mark.parametrize(
    "data",
    [
        {},
        *({"end": "append"}, {"reasoning": "inline"}, {"include_steps": False}),
        {"end": "append", "reasoning": "inline", "turns": "last"},
    ],
    ids=str,
)
def test_a_prompt_begins_what_was_trained_on(data: dict[str, Any]) -> None:
    """Of every example of which nothing else is said, whatever decides its rendering."""
    config, compared = DataConfig(**data), 0
    for template, source in (OWN | ODD).items():
        settings = {"eos_token": "<|im_end|>" if template in OWN else "<|stop|>"}
        settings |= {"bos_token": "<s>", "chat_template": source}
        given = files(None) | {"tokenizer_config.json": json.dumps(settings).encode()}
        made = HubTokenizer(given, "the model")
        for number in range(15):
            for part in select_turns(read(conversation(number)), config.turns):
                try:
                    ids, _, findings = made.encode_example(part, config)
                except (DatasetError, ModelError):
                    continue
                if all(finding.kind != "prompt" for finding in findings):
                    prompt = made.encode_prompt(part, config)
                    assert prompt.tolist() == ids[: len(prompt)].tolist(), (template, number)
                    compared += 1
    assert compared > 50


def test_a_thought_that_is_opened_for_the_last_turn() -> None:
    """Earlier turns begin where the prompt and the text part, after the message before them."""
    row = chat(
        *(("user", "w?"), ("assistant", CALL), ("tool", "RAIN"), ("assistant", "It rains.")),
        *(("user", "thx"), ("assistant", "ok")),
    )
    call = '<call>{"name": "look", "arguments": {"t": "Oslo"}}</call><|stop|>'
    last = "\n</think>\n\nok<|stop|>"
    assert spans(OPENS, row) == [call, "It rains.<|stop|>", last]
    assert refusals(OPENS, row) == []
    row["messages"][1]["trained"] = False
    assert spans(OPENS, row) == ["It rains.<|stop|>", last]


def test_an_end_that_is_written_once() -> None:
    """A turn that has no end before the next message is refused, and ends there."""
    row = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    assert spans(ENDS_ONCE, row) == ["assistant: a1", "assistant: a2\n<|stop|>"]
    assert refusals(ENDS_ONCE, row) == [("end", 2)]


def test_a_reply_within_a_turn() -> None:
    """It is refused; where only the last turn is trained on, it is none of its text."""
    row = chat(("user", "w?"), ("assistant", CALL), ("tool", "RAIN"), ("assistant", "wet"))
    with pytest.raises(ModelError, match="writes message 3 within message 2"):
        spans(REPLY_WITHIN, row)
    row["messages"][1]["trained"] = False
    assert spans(REPLY_WITHIN, row) == ["wet<|stop|>"]


def test_text_after_an_end() -> None:
    """It is trained on as the rest of its turn, which then has no end."""
    row = chat(("user", "w?"), ("assistant", CALL | {"content": "so"}))
    assert "<call>" in spans(ENDS_FIRST, row)[0]
    assert refusals(ENDS_FIRST, row) == [("end", 2)]
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    said = chat(("user", "q"), ("assistant", "write <|stop|> then stop"))
    assert spans(endless, said) == ["assistant: write <|stop|> then stop\n"]
    assert refusals(endless, said) == [("end", 2)]
    assert spans(endless, said, end="append") == ["assistant: write <|stop|> then stop\n<|stop|>"]


def test_a_generation_that_is_empty() -> None:
    """It ends nothing; without any end one is added behind what the turn says, or it is told."""
    two = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}END{% endgeneration %}{% generation %}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "{% endgeneration %}{% else %}{{ m.content }}<|stop|>\n{% endif %}{% endfor %}" + HEAD
    )
    row = chat(("user", "q"), ("assistant", "hello"))
    ended, endless = two.replace("END", "<|stop|>"), two.replace("END", "")
    for end in ("template", "append"):
        assert spans(ended, row, end=end) == ["hello<|stop|>"]
        assert refusals(ended, row, end=end) == []
    assert refusals(endless, row) == [("end", 2)]
    assert spans(endless, row, end="append") == ["hello<|stop|>"]
    trimmed = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    nothing = chat(("user", "q"), ("assistant", " "), ("user", "r"), ("assistant", "s"))
    made = tokenizer(trimmed + "{% if add_generation_prompt %}assistant: {% endif %}")
    ids, _, _ = made.encode_example(read(nothing), DataConfig(end="append"))
    text = made.decode(ids, skip_special_tokens=False)
    assert text == "user: q\nassistant: \n<|stop|>user: r\nassistant: s\n<|stop|>"


def test_the_same_words_twice() -> None:
    """A reply within a turn is found, though the same round stands elsewhere too."""
    call = CALL | {"content": "I will look."}
    said = [("user", "done?"), ("assistant", call), ("tool", "pending"), ("assistant", "no")]
    with pytest.raises(ModelError, match="writes message 3 within message 2"):
        spans(REPLY_WITHIN, chat(*said, *said, ("user", "thanks"), ("assistant", "bye")))


def test_characters_that_a_normalizer_removes() -> None:
    """They are no loss that could be told from what the model was made with."""
    tree = json.loads(small_tokenizers()["byte-level"])
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789:<|>_", *("##" + c for c in "abcdefgh")]
    tree["model"] = {
        **{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
        **{"max_input_chars_per_word": 100, "vocab": {w: n for n, w in enumerate(words)}},
    }
    tree["normalizer"] = {
        **{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
        **{"strip_accents": True, "lowercase": True},
    }
    tree["pre_tokenizer"], tree["decoder"] = {"type": "BertPreTokenizer"}, None
    tree["added_tokens"] = [t | {"id": len(words) + n} for n, t in enumerate(tree["added_tokens"])]
    made = HubTokenizer(files(COUNTS) | {"tokenizer.json": json.dumps(tree).encode()}, "it")
    row = read(chat(("user", "a\u200bb"), ("assistant", "a\u0301\u200d c")))
    ids, trained, _ = made.encode_example(row, DataConfig())
    assert [made._tokenizer.id_to_token(int(i)) for i in ids[trained]] == ["a", "c", "<|stop|>"]


def test_private_characters() -> None:
    """They mark nothing: refused where the template marks generations, elsewhere text."""
    row = chat(("user", "icon \ue0f0no\ue0f1 x"), ("assistant", "ok \ue0f0"))
    marked = OPENS.replace("{{ (m.content", "{% generation %}{{ (m.content").replace(
        "{% else %}{{ m.content }}", "{% endgeneration %}{% else %}{{ m.content }}"
    )
    with pytest.raises(DatasetError, match="U\\+E0F0"):
        spans(marked, row)
    made = tokenizer(COUNTS)
    example = read(row)
    ids = made.encode_example(example, DataConfig())
    text = made.decode(ids.ids, skip_special_tokens=False)
    assert "icon \ue0f0no\ue0f1 x" in text
    prompt = made.decode(made.encode_prompt(example, DataConfig()), skip_special_tokens=False)
    assert "icon \ue0f0no\ue0f1 x" in prompt
    assert spans(COUNTS, row) == ["ok \ue0f0<|stop|>"]
    assert refusals(COUNTS, row) == []


def test_a_text_stands_for_one_thing() -> None:
    """A thought that is dropped is not found in the content; nor the second of two equal calls."""
    row = chat(("user", "q"), ("assistant", {"content": "It is 42", "reasoning_content": "42"}))
    plain = COUNTS.replace("{{ messages | length }} turns\n", "")
    assert refusals(plain, row) == [("thought", 2)]
    twice = chat(
        ("user", "w?"), ("assistant", {"content": "", "tool_calls": CALL["tool_calls"] * 2})
    )
    one = OPENS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert {kind for kind, _ in refusals(one, twice)} == {"call", "argument"}
    assert refusals(OPENS, twice) == []


def test_arguments_as_python_writes_them() -> None:
    """An apostrophe is escaped there; that is no loss."""
    template = OPENS.replace("c.function | tojson", "c.function.arguments | string")
    arguments = {"town": "O'Hare", "say": "\"x\" 'y' é\n"}
    call = {"content": "look", "tool_calls": [{"function": {"name": "", "arguments": arguments}}]}
    assert refusals(template, chat(("user", "w?"), ("assistant", call))) == []
    spelled = OPENS.replace(
        "c.function | tojson", 'c.function.arguments.town | replace("\'", "\\\\\'")'
    )
    call["tool_calls"] = [{"function": {"name": "", "arguments": {"town": "O'Hare"}}}]
    found = refusals(spelled, chat(("user", "w?"), ("assistant", call)))
    assert found == [("argument", 2)]  # the key


def test_a_character_that_the_tokenizer_does_not_know() -> None:
    """In a trained turn it is told, whatever the rest has."""
    row = chat(("user", "the Ж"), ("assistant", "the Ж hell"))
    made = tokenizer(COUNTS, "unigram, NFKC")
    found = made.encode_example(read(row), DataConfig()).findings
    assert {(f.kind, f.trained) for f in found} >= {("unknown text", False), ("unknown text", True)}


@pytest.mark.parametrize("kind", ["byte-level", "prepended"])
def test_a_character_that_the_tokenizer_drops(kind: str) -> None:
    """It is named, in whatever message: what follows it would be masked in a wrong place."""
    tree = json.loads(small_tokenizers()[kind])
    kept = [t for t in tree["model"]["vocab"] if not t.startswith("<0x") and t != "<unk>"]
    kept = [t for t in kept if t.isascii() or "\u2581" in t or kind == "byte-level"]
    if kind == "byte-level":
        tree["pre_tokenizer"] = None
        kept = [t for t in kept if len(t) == 1 and (t.isascii() or t == "\u010a")]
        tree["model"]["merges"] = []
        tree["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": "\u010a"}
    tree["model"] |= {"vocab": {t: n for n, t in enumerate(kept)}, "unk_token": None}
    tree["model"] |= {"byte_fallback": False}
    added = [t for t in tree["added_tokens"] if t["content"] != "<unk>"]
    tree["added_tokens"] = [t | {"id": len(kept) + n} for n, t in enumerate(added)]
    tree["decoder"] = None
    made = HubTokenizer(files(COUNTS) | {"tokenizer.json": json.dumps(tree).encode()}, "it")
    for said in ((("user", "x世y"), ("assistant", "hell")), (("user", "x"), ("assistant", "a世b"))):
        with pytest.raises(DatasetError, match=r"no token for '世' \(U\+4E16\)"):
            made.encode_example(read(chat(*said)), DataConfig())
    fine = read(chat(("user", "xy"), ("assistant", "hell")))
    ids, trained, findings = made.encode_example(fine, DataConfig())
    text = "".join(str(made._tokenizer.id_to_token(int(i))) for i in ids[trained])
    assert text == "hell<|stop|>"
    assert not any(finding.refuses for finding in findings)
