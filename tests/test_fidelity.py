"""Nothing that a row says is lost between the file and the loss without a word before step 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from tests.conftest import run_here
from tests.templates.small_tokenizers import small_tokenizers
from tunix_mlflow.config.schema import DataConfig, LimitsConfig, ModelConfig
from tunix_mlflow.data import datasets, formats, json_text, snapshot
from tunix_mlflow.data.examples import Example, example_id
from tunix_mlflow.errors import DatasetError
from tunix_mlflow.evaluation import scoring
from tunix_mlflow.input.tokens import encode_examples
from tunix_mlflow.models import bundle as bundles
from tunix_mlflow.models import decoder
from tunix_mlflow.models.hub import pretrained
from tunix_mlflow.text.hub_tokenizer import HubTokenizer
from tunix_mlflow.text.probes import losses
from tunix_mlflow.tracking.models import flavor
from tunix_mlflow.training.held_out import held_out_loss

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|stop|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<call>{"name": "{{ c.function.name }}", "arguments":'
    " {{ c.function.arguments | tojson }}}</call>{% endfor %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|stop|>{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}<|stop|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"name": "look", "arguments": {"town": "Oslo", "days": 2}}
TOOL = {"type": "function", "function": {"name": "look", "description": "the weather", "n": 1.10}}


def files(template: str | None, kind: str = "byte-level") -> dict[str, bytes]:
    settings = {"bos_token": "<s>", "eos_token": "<|stop|>"}
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": small_tokenizers()[kind].encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def read(row: dict[str, Any] | str, form: str = "messages") -> Example:
    tree = json_text.parse(row if isinstance(row, str) else json.dumps(row))
    return formats.reader(form, LimitsConfig(), {}, None, has_columns=False)(tree)


def chat(*said: tuple[str, Any], **more: Any) -> dict[str, Any]:
    turns = [{"role": r, **(c if isinstance(c, dict) else {"content": c})} for r, c in said]
    return {"messages": turns, **more}


def trained(template: str | None, example: Example, kind: str = "byte-level", **data: Any) -> str:
    """What is trained on, as text."""
    made = HubTokenizer(files(template, kind), "the model")
    ids, mask, _ = made.encode_example(example, DataConfig(**data))
    return made.decode(ids[mask], skip_special_tokens=False)


def found(template: str | None, example: Example, **data: Any) -> list[tuple[str, int, bool]]:
    """Kind, message, and whether it refuses, of all that is missing."""
    made = HubTokenizer(files(template), "the model")
    findings = made.encode_example(example, DataConfig(**data)).findings
    return [(each.kind, each.turn, each.refuses) for each in findings]


def test_a_thought_in_the_content_stays_there() -> None:
    """It is not cut out of the text into a field that most templates do not read."""
    said = "<think>\nI add one.\n</think>\n\n31"
    row = read(chat(("user", "30+1?"), ("assistant", said)))
    assert row.messages[-1].content == said
    assert trained(PLAIN, row) == f"{said}<|stop|>"
    assert found(PLAIN, row) == []


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_a_thought_in_a_field_is_missed(field: str) -> None:
    """A template that does not read that field loses it, which is told, and can be put right."""
    row = read(chat(("user", "30+1?"), ("assistant", {"content": "31", field: "I add one."})))
    assert found(PLAIN, row) == [("thought", 2, True)]
    assert trained(PLAIN, row, reasoning="inline") == "<think>\nI add one.\n</think>\n\n31<|stop|>"
    assert found(PLAIN, row, reasoning="inline") == []
    assert found(PLAIN, row, include_steps=False) == []
    expected = [] if field == "thinking" else [("thought", 2, True)]
    assert found(THINKS, row) == expected
    assert trained(THINKS, row, reasoning="inline") == "<think>I add one.</think>31<|stop|>"


def test_calls_and_tools_are_written_as_the_row_says() -> None:
    """Arguments that are JSON text are an object, keys keep their order, numbers their digits."""
    text = '{"town": "Oslo", "days": 2.50, "a": [1e2, 12345678901234567890]}'
    row = chat(
        ("user", "weather?"),
        ("assistant", {"content": None, "tool_calls": [{"function": CALL | {"arguments": text}}]}),
    )
    row["tools"] = [TOOL]
    example = read(row)
    assert example.tools == json.dumps([TOOL], separators=(",", ":"))
    spelled = '{"town":"Oslo","days":2.50,"a":[1e2,12345678901234567890]}'
    assert (
        example.messages[-1].tool_calls
        == f'[{{"function":{{"name":"look","arguments":{spelled}}}}}]'
    )
    written = json.dumps(json.loads(text))
    wanted = f'<call>{{"name": "look", "arguments": {written}}}</call><|stop|>'
    assert trained(TOOLS, example) == wanted
    assert found(TOOLS, example) == []
    made = HubTokenizer(files(TOOLS), "the model")
    assert json.dumps(TOOL) in made.decode(
        made.encode_prompt(example, DataConfig()), skip_special_tokens=False
    )
    assert read(json.dumps(row).replace("1.1", "1.10")) != example


def test_what_a_template_drops_is_named() -> None:
    """Calls, arguments, definitions, contents; and whether that is trained on."""
    call = {"content": None, "tool_calls": [{"function": CALL}]}
    row = read(chat(("user", "w?"), ("assistant", call), tools=[TOOL]))
    assert set(found(PLAIN, row)) == {("call", 2, True), ("argument", 2, True), ("tool", 0, False)}
    untrained = call | {"trained": False}
    row = read(
        chat(("user", "w?"), ("assistant", untrained), ("tool", "5"), ("assistant", "5 degrees"))
    )
    assert set(found(PLAIN, row)) == {("call", 2, False), ("argument", 2, False)}
    silent = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    assert ("content", 3, False) in found(silent, row)


@pytest.mark.parametrize("place", ["list", "folder"])
def test_a_template_for_tools_by_name(place: str, tmp_path: Path) -> None:
    """It is used where there are tools, from the settings or a folder beside them."""
    given = files(PLAIN)
    if place == "list":
        settings = json.loads(given["tokenizer_config.json"])
        named = {"default": PLAIN, "tool_use": TOOLS, "rag": "{{ 1 / 0 }}"}
        settings["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
        given["tokenizer_config.json"] = json.dumps(settings).encode()
    else:
        given["chat_template.jinja"] = PLAIN.encode()
        given["additional_chat_templates/tool_use.jinja"] = TOOLS.encode()
    for name, content in given.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    made = HubTokenizer.read(tmp_path)
    assert made.files == given
    assert losses(made)["tools"] == "kept"
    call = {"content": "", "tool_calls": [{"function": CALL}]}
    example = read(chat(("user", "w?"), ("assistant", call)))
    assert "call" in {f.kind for f in made.encode_example(example, DataConfig()).findings}
    other = HubTokenizer(files(PLAIN), "the model")
    assert made.template_digest(DataConfig()) != other.template_digest(DataConfig())


def test_a_model_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`models inspect` says what its template keeps, before there is a dataset."""
    assert losses(HubTokenizer(files(TOOLS), "x")) == {
        "chat": "kept",
        "system": "kept",
        "thought": "the thought is missing",
        "earlier thought": "the thought is missing",
        "tools": "kept",
    }
    assert run_here("models", "inspect", str(base_with(ENDLESS, tmp_path / "base")), "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["rendered chat"] == "no token ends the turn"
    assert "the name of a call is missing" in about["rendered tools"]


@pytest.mark.parametrize("kind", ["unigram, NFKC", "prepended", "byte-level"])
def test_text_that_a_tokenizer_does_not_know(kind: str) -> None:
    """It becomes one token for all that is unknown, unless there are bytes to fall back on."""
    said = "the Ж hell"
    made = HubTokenizer(files(PLAIN, kind), "the model")
    findings = made.encode_example(read(chat(("user", "q"), ("assistant", said))), DataConfig())[2]
    unknown = [f.text for f in findings if f.kind == "unknown text" and f.refuses]
    assert unknown == (["Ж"] if kind.startswith("unigram") else [])
    (finding,) = made.encode_example(read({"text": said}, "text"), DataConfig())[2] or [None]
    assert (finding is not None) == kind.startswith("unigram")


def test_two_turns_that_a_template_joins() -> None:
    """No word of one is trained on for the other."""
    joins = (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role != ns.last %}"
        "{% if ns.last %}<|stop|>{% endif %}<|im_start|>{{ m.role }}\n{% else %} {% endif %}"
        "{{ m.content }}{% set ns.last = m.role %}{% endfor %}<|stop|>"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = [("user", "q"), ("assistant", "one"), ("assistant", "two"), ("user", "r")]
    row = read(chat(*said, ("assistant", "three")))
    assert found(joins, row) == [("end", 2, True)]
    row = read(
        chat(*said[:2], ("assistant", {"content": "two", "trained": False}), ("assistant", "three"))
    )
    assert "two" not in trained(joins, row)


def test_a_turn_without_an_end() -> None:
    """It is told, and the tokenizer's end can be appended to each turn."""
    row = read(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert found(ENDLESS, row) == [("end", 2, True), ("end", 4, True)]
    assert found(ENDLESS, row, end="append") == []
    assert trained(ENDLESS, row, end="append") == "b\n<|stop|>d\n<|stop|>"


def test_a_tokenizer_that_puts_a_space_before_each_text() -> None:
    """The text is encoded as a whole, so there is one such space."""
    row = read(
        chat(("user", "is it"), ("assistant", "the hell"), ("user", "x"), ("assistant", "y"))
    )
    made = HubTokenizer(files(INST, "prepended"), "the model")
    ids = made.encode_example(row, DataConfig()).ids
    text = "<s>[INST] is it [/INST] the hell <|stop|>[INST] x [/INST] y <|stop|>"
    assert ids.tolist() == made._tokenizer.encode(text, add_special_tokens=False).ids
    assert trained(INST, row, "prepended").split() == ["the", "hell", "<|stop|>", "y", "<|stop|>"]


@pytest.mark.parametrize("template", [PLAIN, None])
def test_a_text_is_trained_on_as_text(template: str | None) -> None:
    """Between the tokens that begin and end one, with no template, even where there is none."""
    row = read({"text": "Once upon a time."}, "text")
    made = HubTokenizer(files(template), "the model")
    ids = made.encode_example(row, DataConfig()).ids
    assert made.decode(ids, skip_special_tokens=False) == "<s>Once upon a time.<|stop|>"
    assert trained(template, row) == "Once upon a time.<|stop|>"


def test_which_turns_are_trained_on() -> None:
    """All, the last, or each as an example of its own that ends with it."""
    forgets = PLAIN.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    )
    row = read(
        chat(
            *(("user", "1?"), ("assistant", "<think>first</think>one")),
            *(("user", "2?"), ("assistant", "<think>second</think>two")),
        )
    )
    assert found(forgets, row) == [("thought", 2, True)]
    from tunix_mlflow.data.examples import select_turns

    (last,) = select_turns(row, "last")
    assert found(forgets, last) == [("thought", 2, False)]
    assert trained(forgets, last) == "<think>second</think>two<|stop|>"
    one, two = select_turns(row, "expand")
    assert trained(forgets, one) == "<think>first</think>one<|stop|>"
    assert trained(forgets, two) == "<think>second</think>two<|stop|>"
    assert len(one.messages) == 2


def base_with(template: str, place: Path) -> Path:
    """A small model with a template, as others would hand it to us."""
    shape = ModelConfig(
        width=16, heads=2, kv_heads=2, mlp_width=24, vocab_size=300, max_positions=256
    )
    params = decoder.init(shape, 300, 0)
    pretrained.save(place, shape, params, files=files(template), tokens={"eos_token_id": 0})
    return place


def test_tool_calls_go_the_whole_way(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ingested, shown, trained on, evaluated by their last turn, promoted, and served."""
    call = {"content": None, "tool_calls": [{"function": CALL}]}
    rows = [
        chat(
            ("user", f"w{n}?"), ("assistant", call), ("tool", "5"), ("assistant", "5"), tools=[TOOL]
        )
        | {"split": split}
        for split in ("train", "validation", "test")
        for n in range(3)
    ]
    for n, row in enumerate(rows):
        row["messages"][0]["content"] += str(n)
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.ingest(path, "calls-v1")
    base = base_with(TOOLS, tmp_path / "base")
    assert run_here("datasets", "show", "calls-v1", "--mask", "--base", str(base)) == 0
    shown = capsys.readouterr().out
    assert '<call>{"name": "look", "arguments": {"town": "Oslo", "days": 2}}</call>' in shown
    assert "warning" not in shown
    words = ["train", "dataset=calls-v1", f"base={base}", "training.steps=30"]
    words += ["optimizer.learning_rate=0.01", "training.batch_size=2"]
    assert run_here(*words) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    assert run_here("evaluate", run_id, "--dataset", "calls-v1") == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["examples"] == 3
    assert "held-out loss" in said.err
    metrics = mlflow.MlflowClient().get_run(result["run_id"]).data.metrics
    assert 0 < metrics["eval/loss"] < 6
    assert run_here("promote", run_id, "calls", "promotion.thresholds={exact_match: 0.0}") == 0
    served = mlflow.pyfunc.load_model("models:/calls@champion")
    turns = rows[-1]["messages"][:-1]
    frame = pd.DataFrame({"messages": [turns], "tools": [[TOOL]]})
    (row,) = served.predict(frame).to_dict("records")
    assert row["error"] is None
    assert row["finish_reason"] in ("stop", "length")
    # MLflow wrote a file of its own beside the model's when it loaded it.
    capsys.readouterr()
    assert run_here("promote", run_id, "calls", "promotion.thresholds={exact_match: 0.0}") == 0
    assert "was champion already" in capsys.readouterr().out


def test_a_dataset_without_answers_has_a_loss(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts and calls of tools have nothing to compare with; a model of texts continues one."""
    rows = [{"text": f"{n} and {n} is {2 * n}."} for n in range(30)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.ingest(path, "texts-v1")
    base = base_with(PLAIN, tmp_path / "base")
    (base / "tokenizer_config.json").write_bytes(files(None)["tokenizer_config.json"])
    words = ["dataset=texts-v1", f"base={base}", "training.steps=3", "training.batch_size=2"]
    assert run_here("train", *words) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    assert run_here("evaluate", run_id, "--dataset", "texts-v1") == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert (result["exact_match"], result["examples"]) == (None, 0)
    assert result["without_answer"] == datasets.get("texts-v1").splits["test"].count
    assert result["loss"] > 0
    assert "count in the loss alone" in said.err
    assert run_here("promote", run_id, "texts") == 3
    assert "eval/exact_match was not measured on texts-v1/test" in capsys.readouterr().err
    assert run_here("promote", run_id, "texts", "promotion.thresholds={examples: 0}") == 2
    assert "eval/examples is a count" in capsys.readouterr().err
    assert run_here("promote", run_id, "texts", "promotion.thresholds={loss: 0.01}") == 3
    assert "required at most 0.0100" in capsys.readouterr().err
    assert run_here("promote", run_id, "texts", "promotion.thresholds={loss: 99}") == 0
    capsys.readouterr()
    # One that was trained for longer is better by its loss, and the first is not after it.
    assert run_here("train", *words[:2], "training.steps=30", "training.batch_size=2") == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    assert run_here("evaluate", other, "--dataset", "texts-v1") == 0
    assert run_here("promote", other, "texts", "promotion.thresholds={loss: 99}") == 0
    assert run_here("promote", run_id, "texts", "promotion.thresholds={loss: 99}") == 3
    assert "and champion version 2 has" in capsys.readouterr().err
    assert run_here("models", "inspect", f"models:/{result['model_id']}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["positions"] == 256
    bundle = flavor.load_model(f"models:/{result['model_id']}")
    ids = bundle._prompt(0, bundles.prompt("5 and"), None).ids
    text = bundle.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<s>5 and"
    model = mlflow.pyfunc.load_model(f"models:/{result['model_id']}")
    for request in (["5 and"], pd.DataFrame({"text": ["5 and"]}), model.input_example):
        found = model.predict(request).to_dict("records")
        assert {row["error"] for row in found} == {None}


def test_a_row_that_is_refused_is_not_in_the_loss() -> None:
    """The others are; what is cut at the model's positions is counted."""
    strict = PLAIN.replace("{{ m.role }}", "{{ m.role if m.role != 'system' else 1 / 0 }}")
    shape = ModelConfig(
        width=16, heads=2, kv_heads=2, mlp_width=24, vocab_size=300, max_positions=64
    )
    params, made = decoder.init(shape, 300, 0), HubTokenizer(files(strict), "the model")
    bundle = bundles.Bundle(shape, decoder.shape(shape, 300)[0], params, made, 4)
    rows = [read(chat(("user", "q"), ("assistant", "a"))) for _ in range(2)]
    alone = held_out_loss(bundle, rows, 64)
    refused = read(chat(("system", "s"), ("user", "q"), ("assistant", "a")))
    long = read(chat(("user", "q"), ("assistant", "a" * 200)))
    found = held_out_loss(bundle, [*rows, refused], 64)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    assert len(found.refused) == 1
    assert "the model: the chat template refuses: division by zero" in found.refused[0]
    assert held_out_loss(bundle, [*rows, long], 64).truncated == 1
    with pytest.raises(DatasetError, match="division by zero"):
        held_out_loss(bundle, [refused], 64)


def test_an_example_is_refused_whole() -> None:
    """With data.turns=expand, where only one of its turns is: no part of it stays."""
    strict = PLAIN.replace(
        "{{ m.content }}", "{{ raise_exception('no') if m.content == 'b' else m.content }}"
    )
    made = HubTokenizer(files(strict), "the model")
    said = [("user", "q"), ("assistant", "a"), ("user", "r")]
    rows = [read(chat(*said, ("assistant", last))) for last in ("b", "c")]
    refused: list[str] = []
    tokenized = encode_examples(rows, made, DataConfig(turns="expand"), refused)
    assert (tokenized.count, len(refused)) == (2, 1)
    with pytest.raises(DatasetError, match=r"example [0-9a-f-]+ \('r'\): the model"):
        encode_examples(rows, made, DataConfig(turns="expand"))


def test_tokens_that_the_model_has_no_row_for() -> None:
    """A name in the settings alone gets an id beyond the table, and is not written."""
    settings = {"bos_token": "<new>", "eos_token": "<|stop|>", "pad_token": "<newer>"}
    given = files(None) | {"tokenizer_config.json": json.dumps(settings).encode()}
    size = HubTokenizer(files(None), "the model").vocab_size
    made = HubTokenizer(given, "the model", size)
    row = read({"text": "Once."}, "text")
    ids = made.encode_example(row, DataConfig()).ids
    assert made.decode(ids, skip_special_tokens=False) == "Once.<|stop|>"
    assert max(*ids, made.pad_id, made.own_eos_id, *made.eos_ids) < size
    assert HubTokenizer(given, "the model").encode_example(row, DataConfig()).ids[0] >= size


def test_a_call_with_a_text_is_not_compared() -> None:
    """Its text alone is not its answer, whether it is empty, null or more."""
    for content in ("", None, "Let me see."):
        call = {"content": content, "tool_calls": [{"function": CALL}]}
        assert scoring.expected(read(chat(("user", "w?"), ("assistant", call)))) is None
    for content, answer in (("  ", None), ("<think>x</think>", None), ("5 ", "5")):
        assert scoring.expected(read(chat(("user", "w?"), ("assistant", content)))) == answer


def test_a_heading_is_no_mark_of_an_answer() -> None:
    """`####` separates an answer where a single line follows it, or the form has steps."""
    said = "Do.\n#### Notes\nsee docs"
    assert scoring.expected(read(chat(("user", "q"), ("assistant", said)))) == said
    solved = read(chat(("user", "q"), ("assistant", "2+2\n#### 4")))
    assert scoring.expected(solved) == "4"
    row = read({"question": "q", "answer": "2+2\n#### 4"}, "question-answer")
    assert ([step.content for step in row.steps], row.answer) == (["2+2"], "4")
    code = "def f():\n    return 1\n\nf()"
    row = read({"question": "q", "answer": f"{code}\n#### 1"}, "question-answer")
    assert ([step.content for step in row.steps], row.answer) == ([code], "1")
    row = read({"question": "q", "answer": "Intro\n##### H"}, "question-answer")
    assert (row.steps, row.answer) == ((), "Intro\n##### H")


def test_a_column_of_reasoning_is_a_thought() -> None:
    """Of the last turn, in every form; two of them are refused."""
    prompt = [{"role": "user", "content": "q"}]
    row: dict[str, Any] = {"prompt": prompt, "completion": "a", "reasoning": "because"}
    assert read(row, "prompt-completion").messages[-1].reasoning == "because"
    row = chat(("user", "q"), ("assistant", "a")) | {"reasoning": "because"}
    assert read(row).messages[-1].reasoning == "because"
    row["messages"][-1]["reasoning"] = "so"
    with pytest.raises(ValueError, match="a reasoning of its own"):
        read(row)
    with pytest.raises(ValueError, match="`tools` too"):
        read(chat(("user", "q"), ("assistant", "a"), tools=[TOOL], functions=[TOOL]))


def test_a_prompt_is_not_learned() -> None:
    """Of a prompt and a completion the completion is, unless a turn of the prompt says so."""
    prompt: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "earlier"},
        {"role": "user", "content": "r"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "last"}]}
    assert trained(PLAIN, read(row, "prompt-completion")) == "last<|stop|>"
    prompt[1]["trained"] = True
    example = read(row | {"system": "s"}, "prompt-completion")
    assert trained(PLAIN, example) == "earlier<|stop|>last<|stop|>"


def test_keys_that_are_escaped(tmp_path: Path) -> None:
    """A call's spelling is kept however its key is written in the file."""
    call = '{"function": {"name": "f", "arguments": {"n": 1.10}}}'
    line = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null,'
        f' "\\u0074ool_calls": [{call}]}}]}}'
    )
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (example,) = snapshot.read(datasets.ingest(tmp_path / "a.jsonl", "one-v1").manifest.digest)
    assert "1.10" in (example.messages[-1].tool_calls or "")


def test_an_end_after_a_space() -> None:
    """What the template writes behind a turn ends a completion, whatever the settings name."""
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": INST}
    for kind in ("byte-level", "prepended"):
        given = files(INST, kind) | {"tokenizer_config.json": json.dumps(settings).encode()}
        made = HubTokenizer(given, "the model")
        assert made._token_id("<|stop|>") in made.eos_ids
        example = read(chat(("user", "a"), ("assistant", "b")))
        assert made.encode_example(example, DataConfig()).findings == ()


def test_how_examples_would_be_rendered_is_shown(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the keys that a refusal recommends; and a row that is refused is named."""
    rows = [
        chat(("user", f"a{n}"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        for n in range(12)
    ]
    rows.append(chat(("system", "s"), ("user", "a"), ("assistant", "b")) | {"split": "train"})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    datasets.ingest(path, "chats-v1")
    base = str(base_with(ENDLESS, tmp_path / "base"))
    show = ["datasets", "show", "chats-v1", "--mask", "--base", base, "--limit", "1"]
    assert run_here(*show) == 0
    assert "no token ends the turn" in capsys.readouterr().out
    assert run_here(*show, "data.end=append", "data.turns=expand") == 0
    shown = capsys.readouterr().out
    assert "<|stop|>" in shown
    assert "no token" not in shown
    assert shown.count("trained ") == 2
    assert run_here(*show, "training.steps=3") == 2
    assert "training.steps is not read here" in capsys.readouterr().err
    assert run_here("datasets", "show", "chats-v1", "data.turns=last") == 2
    assert "data.turns is read with --mask only" in capsys.readouterr().err
    counted = ["datasets", "stats", "chats-v1", "--base", base, "--json"]
    assert run_here(*counted, "data.end=append", "data.turns=expand") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 24
    assert run_here("train", "dataset=chats-v1", f"base={base}", "--plan") == 0
    said = capsys.readouterr()
    assert "training would be refused: dataset chats-v1: no token ends the turn" in said.err
    assert "examples of train, first in message 2" in said.err
    assert "data.end=append adds" in json.loads(said.out)["refused"]
    strict = PLAIN.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}",
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[-1:]))
    datasets.ingest(path, "strict-v1")
    other = str(base_with(strict, tmp_path / "strict"))
    assert run_here("datasets", "show", "strict-v1", "--mask", "--base", other) == 0
    assert "the chat template refuses: no system" in capsys.readouterr().out
    assert run_here("datasets", "stats", "strict-v1", "--base", other) == 2
    name = example_id(snapshot.read(datasets.get("strict-v1").digest)[0])
    assert f"example {name} ('a'): {other}: the chat template refuses" in capsys.readouterr().err


def test_a_run_is_refused_before_its_first_step(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 3, the row and what is missing; `show --mask` and --plan say it too, and
    data.fidelity=record trains, with the counts as tags."""
    call = {"content": None, "tool_calls": [{"function": CALL}]}
    rows = [
        chat(("user", f"w{n}?"), ("assistant", call), ("tool", "5"), ("assistant", f"{n} degrees"))
        for n in range(12)
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.ingest(path, "calls-v1")
    base = base_with(PLAIN, tmp_path / "base")
    words = ["train", "dataset=calls-v1", f"base={base}", "training.steps=2"]
    first = snapshot.read(datasets.get("calls-v1").digest, "train")[0]
    assert found(PLAIN, first)[0] == ("call", 2, True)
    assert run_here(*words) == 3
    said = capsys.readouterr().err
    assert "the name of a call is missing in" in said
    assert "first in message 2 of example" in said
    assert run_here(*words, "--plan") == 0
    assert "the name of a call is missing" in capsys.readouterr().err
    assert run_here("datasets", "show", "calls-v1", "--mask", "--base", str(base)) == 0
    assert "warning: the name of a call is missing (message 2): 'look'" in capsys.readouterr().out
    assert run_here("datasets", "stats", "calls-v1", "--base", str(base)) == 0
    assert "warning: the name of a call is missing in 12 of 12" in capsys.readouterr().out
    assert run_here(*words, "data.fidelity=record") == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    tags = mlflow.MlflowClient().get_run(run_id).data.tags
    assert int(tags["tunix_mlflow.fidelity.call.trained"]) > 0
