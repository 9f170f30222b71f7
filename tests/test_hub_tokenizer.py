"""Pretrained tokenizers: what is trained on follows from the template, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tunix_mlflow.config.schema import DataConfig
from tunix_mlflow.data.examples import Example, Message, Step
from tunix_mlflow.errors import DatasetError, ModelError
from tunix_mlflow.text.hub_tokenizer import HubTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As ChatML, but it says which part is the assistant's.
MARKED = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2's way: no mark before the assistant's turn but the end of the user's.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Gemma's: trims what is said.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen 3's: the last answer has an empty thought before it, and earlier ones have none.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "<start_of_turn>")


def files(template: str | None, **more: Any) -> dict[str, bytes]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("l", "l"), ("i", "s"), ("Ċ", "Ċ"), ("a", "s")]
    vocabulary = {t: n for n, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}} | more
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def tokenizer(template: str | None, **more: Any) -> HubTokenizer:
    return HubTokenizer(files(template, **more), "the model")


def spelled(made: HubTokenizer, example: Example, steps: bool = True) -> list[str]:
    """The stretches that are trained on, as text with special tokens."""
    ids, trained, _ = made.encode_example(example, DataConfig(include_steps=steps))
    found: list[str] = []
    for place, token in enumerate(ids):
        if trained[place]:
            if place == 0 or not trained[place - 1]:
                found.append("")
            found[-1] += made._tokenizer.decode([int(token)], skip_special_tokens=False)
    return found


def turns(*said: tuple[str, str], **marks: bool) -> Example:
    return Example(
        messages=tuple(
            Message(role=role, content=text, trained=marks.get(f"m{n}"))
            for n, (role, text) in enumerate(said)
        )
    )


CHAT = turns(
    ("user", "hi there"), ("assistant", "hello\n\nyou"), ("user", "is it?"), ("assistant", "it is")
)


@pytest.mark.parametrize("template", [CHATML, MARKED, INST, GEMMA])
def test_all_turns_of_the_assistant_are_trained_on(template: str) -> None:
    """With what ends them, and nothing beside; with marks of the template and without."""
    made = tokenizer(template)
    before = " " if template == INST else ""
    wanted = [f"{before}hello\n\nyou<|im_end|>", f"{before}it is<|im_end|>"]
    assert spelled(made, CHAT) == wanted
    ids = made.encode_example(CHAT, DataConfig()).ids
    text = made._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == made.template.render(
        [{"role": m.role, "content": m.content} for m in CHAT.messages]
    )
    untrained = turns(*((m.role, m.text) for m in CHAT.messages), m1=False)
    assert spelled(made, untrained) == wanted[1:]


@pytest.mark.parametrize("template", [CHATML, MARKED, INST, GEMMA, FORGETS])
def test_a_prompt_is_the_beginning_of_its_example(template: str) -> None:
    """Token by token, so that a model is asked as it was trained."""
    made = tokenizer(template)
    asked = turns(*((m.role, m.text) for m in CHAT.messages[:1]), ("assistant", "as the"))
    ids, trained, _ = made.encode_example(asked, DataConfig())
    prompt = made.encode_prompt(asked, DataConfig())
    assert np.array_equal(ids[: len(prompt)], prompt)
    assert not trained[: len(prompt)].any()
    assert trained[len(prompt)]


def test_a_template_that_forgets() -> None:
    """Earlier turns are written otherwise once more follow: what stands there is trained on."""
    made = tokenizer(FORGETS)
    wanted = ["hello\n\nyou<|im_end|>", "<think>\n\n</think>\n\nit is<|im_end|>"]
    assert spelled(made, CHAT) == wanted
    unsaid = tokenizer(FORGETS.replace("{{ m.content }}", "{% if loop.last %}z{% endif %}"))
    found = unsaid.encode_example(CHAT, DataConfig()).findings
    assert [(f.kind, f.turn) for f in found if f.refuses] == [
        *(("content", 2), ("content", 4), ("end", 2), ("end", 4))
    ]
    last = turns(*((m.role, m.text) for m in CHAT.messages), m1=False)
    assert spelled(made, last) == ["<think>\n\n</think>\n\nit is<|im_end|>"]


def test_reasoning_and_answer() -> None:
    """Steps, a mark, the answer; and the answer found again."""
    made = tokenizer(CHATML)
    trace = Example(
        messages=(Message(role="user", content="2+2?"),),
        steps=(Step(i=0, content="2 and 2"), Step(i=1, content="is 4")),
        answer="4",
    )
    assert spelled(made, trace) == ["2 and 2\nis 4\n#### 4<|im_end|>"]
    assert spelled(made, trace, steps=False) == ["4<|im_end|>"]
    for text, marked, unmarked in (
        ("2 and 2\nis 4\n#### 4", "4", "4"),
        (" 4 ", "4", "4"),
        ("<think>\n#### 5\n</think>\n4", "4", "4"),
        ("", None, None),
        ("####", None, None),
        ("so #### 4", "4", "4"),
        ("##### 4 a####4", "##### 4 a####4", "##### 4 a####4"),
        ("Do.\n#### Notes\nsee docs", "Notes\nsee docs", "Do.\n#### Notes\nsee docs"),
    ):
        ids = made._tokenizer.encode(text).ids
        assert made.read_answer(ids, marked=True) == marked
        assert made.read_answer(ids, marked=False) == unmarked


def test_nobody_can_say_special_tokens_for_the_template() -> None:
    """What looks like one in a message is one, as in every chat server: the digest says so."""
    made = tokenizer(CHATML)
    assert made.eos_ids == (made._tokenizer.token_to_id("<|im_end|>"),)
    assert made.digest == tokenizer(CHATML).digest
    assert made.digest != tokenizer(CHATML, eos_token="<s>").digest
    assert made.template_digest(DataConfig()) != made.template_digest(
        DataConfig(include_steps=False)
    )
    assert made.template_digest(DataConfig()) != tokenizer(MARKED).template_digest(DataConfig())


def test_ends_come_from_generation_config_too() -> None:
    """A list or a number."""
    said = {"eos_token_id": [3, 5]}
    made = HubTokenizer(
        files(CHATML) | {"generation_config.json": json.dumps(said).encode()}, "here"
    )
    own = made._tokenizer.token_to_id("<|im_end|>")
    assert own is not None
    assert made.eos_ids == tuple(sorted({3, 5, own}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{% for m in messages %}{{ m.update({'a': 1}) }}{% endfor %}", "refuses"),
        ("{{ undefined_function() }}", "refuses"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{% include '/etc/passwd' %}", "refuses"),
        (INST.replace("'user'", "'nobody'"), "only user and assistant"),
    ],
)
def test_a_template_can_only_write_text(template: str, message: str) -> None:
    """It runs in a sandbox, and what it refuses is one line."""
    with pytest.raises(DatasetError, match=message) as caught:
        tokenizer(template).encode_prompt(CHAT, DataConfig())
    assert "\n" not in str(caught.value)


def test_a_base_model_ends_where_its_template_does() -> None:
    """Its own end is another token, which its turns never end with."""
    made = tokenizer(CHATML, eos_token="<s>")
    ends = {made._tokenizer.token_to_id(token) for token in ("<s>", "<|im_end|>")}
    assert set(made.eos_ids) == ends
    assert spelled(made, CHAT) == ["hello\n\nyou<|im_end|>", "it is<|im_end|>"]


def test_a_token_that_the_model_lacks() -> None:
    """A tokenizer may have more tokens than the model, and no text may use them."""
    whole = tokenizer(CHATML)
    made = HubTokenizer(files(CHATML), "the model", whole.vocab_size - 1)  # <start_of_turn>
    assert np.array_equal(
        made.encode_prompt(CHAT, DataConfig()), whole.encode_prompt(CHAT, DataConfig())
    )
    with pytest.raises(DatasetError, match="does not know the token '<start_of_turn>'"):
        made.encode_prompt(turns(("user", "a <start_of_turn>"), ("assistant", "b")), DataConfig())


def test_what_is_missing_or_damaged_is_named() -> None:
    """Tokenizer, template, settings."""
    good = files(CHATML)
    for broken, message in (
        ({}, "has no tokenizer.json"),
        (good | {"tokenizer.json": b"{}"}, "damaged"),
        (good | {"tokenizer_config.json": b"["}, "tokenizer_config.json is damaged"),
        (files("{{ messages }}", eos_token=None), "end-of-sequence"),
        (good | {"generation_config.json": b'{"eos_token_id": "x"}'}, "eos_token_id"),
        (good | {"chat_template.jinja": b"\xff"}, "not UTF-8"),
    ):
        with pytest.raises(ModelError, match=message):
            HubTokenizer(broken, "the model")
    with pytest.raises(ModelError, match="the chat template is damaged"):
        tokenizer("{% for %}").encode_prompt(CHAT, DataConfig())
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer(None).encode_prompt(CHAT, DataConfig())
