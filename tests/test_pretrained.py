"""Pretrained models: transformers' numbers, the same bytes back, and every fault named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

from tests.golden.make import GREEDY, LENGTH, PROMPT, VOCABULARY, weights
from tunix_mlflow.config.schema import LoraConfig, ModelConfig
from tunix_mlflow.errors import ModelError
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.models import decoder, generation, lora
from tunix_mlflow.models.hub import base as bases
from tunix_mlflow.models.hub import families, gguf_file, pretrained
from tunix_mlflow.training.losses import FLOAT32, token_losses

pytestmark = pytest.mark.usefixtures("quick_compile")
GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def about(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return result


def folder_of(name: str, folder: Path, shards: int = 1) -> Path:
    """A model as transformers saved it."""
    saved = about(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(saved["config"]))
    offset = name.startswith("gemma")
    tensors = {k: weights(k, tuple(shape), offset) for k, shape in saved["tensors"].items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    listed: dict[str, str] = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def imported(folder: Path) -> tuple[ModelConfig, decoder.Params]:
    with pretrained.opened(folder) as source:
        params = pretrained.load(source, VOCABULARY, lambda array, _: jnp.asarray(array))
        return source.config, params


def plain(config: ModelConfig) -> decoder.Graph:
    return decoder.shape(config, VOCABULARY)[0]


@partial(jax.jit, static_argnames=("graph",))
def logits(graph: decoder.Graph, params: decoder.Params, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = decoder.segment_mask(jnp.ones_like(tokens))
    return nnx.merge(graph, params)(tokens, positions, mask)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Logits within 1e-4; each of 64 tokens of greedy text is the likeliest after those before."""
    config, params = imported(folder_of(name, tmp_path / "model", shards=3))
    golden = np.load(GOLDEN / f"{name}.npz")
    text = np.concatenate([golden["tokens"][0, :PROMPT], golden["greedy"]])
    tokens = np.zeros((3, len(text)), np.int32)  # one shape for both: one compilation a model
    tokens[:2, :LENGTH], tokens[2] = golden["tokens"], text
    result = np.asarray(logits(plain(config), params, jnp.asarray(tokens)))
    assert np.abs(result[:2, :LENGTH] - golden["logits"]).max() < 1e-4
    assert result[2, PROMPT - 1 : -1].argmax(axis=-1).tolist() == golden["greedy"].tolist()


# Of each family one: rope scaling, windows and softcaps, tied embeddings and not.
@pytest.mark.parametrize("name", ["gemma2-b", "gemma3-b", "llama-b", "qwen2-c", "qwen3-a"])
def test_fused_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Within 1e-4."""
    config, params = imported(folder_of(name, tmp_path / "model"))
    golden = np.load(GOLDEN / f"{name}.npz")
    graph = decoder.shape(config, VOCABULARY, fused=True)[0]
    fused = jax.jit(partial(decoder.fuse, config=config))(params)
    result = logits(graph, fused, jnp.asarray(golden["tokens"]))
    assert np.abs(result - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["gemma2-b", "gemma3-b", "llama-b", "qwen2-c", "qwen3-c"])
def test_generated_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """64 tokens of greedy text, through the cache; in windows too, for families that have them."""
    config, params = imported(folder_of(name, tmp_path / "model"))
    assert config.windowed_layers or name.startswith("llama")
    golden = np.load(GOLDEN / f"{name}.npz")
    (text,) = generation.generate(
        plain(config),
        params,
        [golden["tokens"][0, :PROMPT]],
        limits=[GREEDY],
        eos_ids=(),
        pad_id=0,
    )
    assert text.ids.tolist() == golden["greedy"].tolist()


def test_every_family_has_three_shapes() -> None:
    """Tied and untied, grouped heads, scaled positions, windows where the family has them."""
    kinds = [families.read(about(name)["config"], name) for name in MODELS]
    for family in families.ARCHITECTURES:
        shapes = [kind for kind in kinds if kind.family == family]
        assert len(shapes) == 3
        assert len({kind.heads // kind.kv_heads for kind in shapes}) > 1
        assert {kind.tie_embeddings for kind in shapes} == {True, False}
        if family != "llama":
            assert any(kind.windowed_layers for kind in shapes)
    assert {k.rope_scaling.kind for k in kinds if k.rope_scaling} == {"linear", "llama3"}


@pytest.mark.parametrize("name", MODELS)
def test_export_and_import_is_the_same(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Import, export, import: configuration and every bit; in shards too."""
    config, params = imported(folder_of(name, tmp_path / "model"))
    pretrained.save(tmp_path / "one", config, params)
    monkeypatch.setattr(pretrained, "_SHARD_BYTES", 10_000)
    pretrained.save(tmp_path / "many", config, params)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for saved in ("one", "many"):
        again, back = imported(tmp_path / saved)
        assert again == config
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
            assert a.tobytes() == b.tobytes()
    scale = json.loads((tmp_path / "one" / "config.json").read_text()).get("query_pre_attn_scalar")
    assert not isinstance(scale, float) or not scale.is_integer()  # transformers 5 wants an int
    original = load_file(tmp_path / "model" / "model.safetensors")
    written = load_file(tmp_path / "one" / "model.safetensors")
    assert sorted(original) == sorted(written)
    assert all(original[key].tobytes() == written[key].tobytes() for key in original)


def _truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _missing(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _header(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", 2**40) + shard.read_bytes()[8:])


def _empty(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def _changed(change: Callable[[dict[str, Any]], None], listed: bool = False) -> Any:
    def damage(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)
        if listed:
            path = folder / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            old = {k: v for k, v in index["weight_map"].items() if v != shard.name}
            index["weight_map"] = old | dict.fromkeys(tensors, shard.name)
            path.write_text(json.dumps(index))

    return damage


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other"}}')


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (_missing, "damaged or missing"),
    "truncated": (_truncated, "damaged or missing"),
    "bad header": (_header, "damaged or missing"),
    "empty": (_empty, "damaged or missing"),
    "another shape": (
        _changed(lambda t: t.update({next(iter(t)): np.zeros((3, 5), np.float32)})),
        "has shape",
    ),
    "one more": (_changed(lambda t: t.update(more=np.zeros(2, np.float32)), True), "no tensor of"),
    "one less": (_changed(lambda t: t.pop(next(iter(t))), True), "is missing"),
    "not in the index": (
        _changed(lambda t: t.update(more=np.zeros(2, np.float32))),
        "not in the index",
    ),
    "not in its shard": (_changed(lambda t: t.pop(next(iter(t)))), "not in its shard"),
    "integers": (
        _changed(lambda t: t.update({next(iter(t)): np.zeros((3, 5), np.int8)})),
        "only floats",
    ),
    "an index that leaves": (_index, "files beside it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    """A shard missing, cut off, of other shapes, with more or fewer tensors: one line, exit 2."""
    folder = folder_of("qwen2-b", tmp_path / "model", shards=3)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ModelError, match=message) as caught:
        imported(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": "gemma3", "text_config": {}}, "text model alone"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "yarn"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "width"),
        ({"num_key_value_heads": 4}, "do not go together"),
        ({"model_type": []}, "wrong kind"),
        ({"rope_parameters": "linear"}, "wrong kind"),
        ({"num_hidden_layers": "two"}, r"layer_types|wrong kind"),
        ({"layer_types": 3}, "wrong kind"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ],
)
def test_what_is_not_implemented_is_named(change: dict[str, Any], message: str) -> None:
    """Never a silent approximation."""
    tree = about("qwen3-a")["config"] | change
    with pytest.raises(ModelError, match=message):
        families.read(tree, "config.json")


def test_the_older_spelling_is_understood() -> None:
    """config.json as transformers 4 wrote it, of the models that people have."""
    llama = {
        **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
        **{"vocab_size": 61, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        **{"torch_dtype": "bfloat16", "max_position_embeddings": 131072},
        **{"tie_word_embeddings": True, "pretraining_tp": 1, "mlp_bias": False},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    }
    read = families.read(llama, "config.json")
    assert read.rope_scaling is not None
    assert read.rope_scaling.factor == 32.0
    assert read.rope_theta == 500_000.0
    gemma = {
        **{"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 96},
        **{"head_dim": 16, "vocab_size": 61, "rms_norm_eps": 1e-6, "rope_theta": 1000000},
        **{"rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512},
        **{"sliding_window_pattern": 6, "query_pre_attn_scalar": 256},
        **{"max_position_embeddings": 32768, "hidden_activation": "gelu_pytorch_tanh"},
    }
    read = families.read(gemma, "config.json")
    assert read.windowed_layers == (0, 1, 2, 3, 4, 6)
    assert read.window_rope_theta == 10_000.0
    assert families.read(families.write(read, 61), "again") == read


def test_a_hub_cache_is_a_folder_too(tmp_path: Path) -> None:
    """models--org--name with refs and snapshots."""
    cache = tmp_path / "models--org--name"
    folder_of("llama-a", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert pretrained.resolve(cache).name == "abc"
    shutil.rmtree(cache / "refs")
    assert pretrained.resolve(cache).name == "abc"
    with pytest.raises(ModelError, match="there is no"):
        pretrained.resolve(tmp_path / "nowhere")


def test_a_tied_output_must_be_the_table(tmp_path: Path) -> None:
    """Some files hold it twice; another one would be left out in silence."""
    folder = folder_of("llama-a", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    imported(folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="tied"):
        imported(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(dtype: str, tmp_path: Path) -> None:
    """Read as float32, number by number; and written narrow when that is asked for."""
    folder = folder_of("llama-b", tmp_path / "model")
    wide = load_file(folder / "model.safetensors")
    narrow = {name: array.astype(jnp.dtype(dtype)) for name, array in wide.items()}
    save_file(narrow, folder / "model.safetensors")
    config, params = imported(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    pretrained.save(tmp_path / "wide", config, params)
    back = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(np.array_equal(back[n], narrow[n].astype(np.float32)) for n in narrow)
    if dtype == "bfloat16":
        pretrained.save(tmp_path / "narrow", config, params, dtype=dtype)
        kept = load_file(tmp_path / "narrow" / "model.safetensors")
        assert all(kept[n].tobytes() == narrow[n].tobytes() for n in narrow)


def gguf_of(name: str, path: Path) -> None:
    """A model of the llama family as llama.cpp keeps it, with a tokenizer of bytes."""
    fields = about(name)["config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(fields["head_dim"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    parts = {theirs: ours for ours, theirs in gguf_file._BLOCK.items()}
    top_level = {theirs: ours for ours, theirs in gguf_file._TOP_LEVEL.items()}
    for key, shape in about(name)["tensors"].items():
        array = weights(key, tuple(shape), False)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in key:  # rotary pairs as neighbours
                halves = array.reshape(fields[heads], 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        ours = top_level.get(key)
        if ours is None:
            _, _, layer, part = key.split(".", 3)
            ours = f"blk.{layer}.{parts[part]}"
        writer.add_tensor(ours, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    """Pairs put back into halves, configuration, tokenizer; cut off, it is named."""
    path = tmp_path / "model.gguf"
    gguf_of("llama-a", path)
    base = bases.find(path)
    config, params = imported(folder_of("llama-a", tmp_path / "model"))
    assert base.config == config
    assert base.tokenizer.eos_ids == (1,)
    read, _ = bases.load(base, lambda array, _: array)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
        assert np.array_equal(a, b)
    for length in (path.stat().st_size - 4000, 3000, 20, 0):
        cut = tmp_path / f"cut{length}.gguf"
        cut.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"cut\d+\.gguf"):
            bases.load(bases.find(cut), lambda array, _: array)


@pytest.mark.parametrize("name", ["llama-b", "gemma3-b"])
def test_adapters_begin_at_nothing(name: str, tmp_path: Path) -> None:
    """A model with fresh adapters computes what it did."""
    config, params = imported(folder_of(name, tmp_path / "model"))
    small = LoraConfig(rank=3)
    graph = decoder.shape(config, VOCABULARY, lora=small)[0]
    adapters = jax.tree.map(jnp.asarray, lora.init(config, VOCABULARY, small, seed=1))
    assert len(jax.tree.leaves(adapters)) == 2 * 7 * config.layers
    tokens = jnp.asarray(np.load(GOLDEN / f"{name}.npz")["tokens"])
    before = logits(plain(config), params, tokens)
    assert np.allclose(logits(graph, lora.joined(adapters, params), tokens), before, atol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    after = logits(graph, lora.joined(moved, params), tokens)
    assert not np.allclose(after, before, atol=1e-2)
    merged = lora.merged(moved, params, small)
    assert np.allclose(after, logits(plain(config), merged, tokens), atol=1e-4)


def test_adapters_in_the_scanned_form(tmp_path: Path) -> None:
    """The same losses and gradients, with windows, and with inputs left out at random."""
    name = "gemma3-b"
    config, params = imported(folder_of(name, tmp_path / "model"))
    # Random bits take XLA half a second for each target.
    small = LoraConfig(rank=3, dropout=0.3, targets=("q_proj", "o_proj", "down_proj"))
    adapters = lora.init(config, VOCABULARY, small, seed=1)
    adapters = jax.tree.map(lambda leaf: jnp.asarray(leaf + np.float32(0.01)), adapters)
    tokens = np.load(GOLDEN / f"{name}.npz")["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, tokens, positions, ones, ones > 0)

    def loss(adapters: decoder.Params, *, scanned: bool) -> jax.Array:
        graph = decoder.shape(config, VOCABULARY, scanned=scanned, lora=small)[0]
        formed = decoder.stack if scanned else lambda same: same
        both = lora.joined(formed(adapters), formed(params))
        return token_losses(graph, both, batch, FLOAT32, jax.random.key(3))[0]

    (a, plainly), (b, scanned) = (
        jax.jit(jax.value_and_grad(partial(loss, scanned=scanned)))(adapters)
        for scanned in (False, True)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    for one, other in zip(jax.tree.leaves(plainly), jax.tree.leaves(scanned), strict=True):
        assert np.allclose(one, other, rtol=1e-3, atol=1e-3)
