"""The decoder and generation, against plain computations.

Nearly all the time of these tests is XLA's compiler. So what is compared is jitted as one program,
and what several tests compare with is computed once (`lru_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
from flax import nnx

from tunix_mlflow.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.input import batches
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.input.packing import TokenRows, lay_out_rows
from tunix_mlflow.input.tokens import encode_examples
from tunix_mlflow.models import cpu_kernels, decoder, generation, rotary
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import optimizer as optimizers
from tunix_mlflow.training import step
from tunix_mlflow.training.losses import FLOAT32, PrecisionPolicy, cross_entropy, token_losses
from tunix_mlflow.training.spec import StepSpec
from tunix_mlflow.training.state import InitialState, TrainState, init_state
from tunix_mlflow.training.step import StepMetrics
from tunix_mlflow.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPES = {
    "grouped, tied": ModelConfig(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24),
    "one head, untied": ModelConfig(
        layers=1, width=12, heads=1, kv_heads=1, mlp_width=8, tie_embeddings=False
    ),
    "odd head width": ModelConfig(
        layers=1, width=10, heads=3, kv_heads=1, head_dim=6, mlp_width=20
    ),
}
WINDOWED = ModelConfig(
    layers=3,
    width=16,
    kv_heads=2,
    mlp_width=24,
    window=3,
    windowed_layers=(0, 2),
    window_rope_theta=100.0,
)
VOCAB = 40


@lru_cache
def built(name: str) -> tuple[decoder.Graph, decoder.Params]:
    return decoder.build(SHAPES[name], VOCAB, seed=1)


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> tuple[decoder.Graph, decoder.Params]:
    return built(request.param)


LENGTH = 64  # one shape, compiled once a model


@partial(jax.jit, static_argnames="graph")
def forward(
    graph: decoder.Graph,
    params: decoder.Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    mask = decoder.segment_mask(segments[None])
    return nnx.merge(graph, params)(tokens[None], positions[None], mask)[0][0]


def logits(graph: decoder.Graph, params: decoder.Params, *examples: np.ndarray) -> np.ndarray:
    """Logits of the examples in one row, without a cache: [sum of lengths, vocab]."""
    tokens, positions, segments = (np.zeros(LENGTH, np.int32) for _ in range(3))
    start = 0
    for number, ids in enumerate(examples, start=1):
        here = slice(start, start + len(ids))
        tokens[here], positions[here], segments[here] = ids, np.arange(len(ids)), number
        start += len(ids)
    return np.asarray(forward(graph, params, tokens, positions, segments))[:start]


def test_the_future_is_not_seen(model: tuple[decoder.Graph, decoder.Params]) -> None:
    """Changing a later token leaves earlier logits as they were, bit for bit."""
    tokens = np.arange(10, dtype=np.int32) + 3
    before = logits(*model, tokens)
    tokens[7] = 30
    after = logits(*model, tokens)
    assert np.array_equal(before[:7], after[:7])
    assert not np.array_equal(before[7:], after[7:])


def test_packed_examples_do_not_see_each_other(
    model: tuple[decoder.Graph, decoder.Params],
) -> None:
    """Neighbours in a row change nothing: exactly zero leaks through the mask."""
    rng = np.random.default_rng(0)
    first, second, other = (rng.integers(1, VOCAB, n).astype(np.int32) for n in (6, 9, 6))

    packed = logits(*model, first, second)
    assert np.array_equal(packed[6:], logits(*model, other, second)[6:])
    assert np.allclose(packed[6:], logits(*model, second), atol=1e-5)
    assert np.allclose(packed[:6], logits(*model, first), atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance() -> None:
    """Scores of rotated pairs depend on the distance between positions alone."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    frequency = rotary.frequencies(8, 10_000.0)

    def score(i: int, j: int) -> float:
        a = rotary.rotate(q, *rotary.rope_sin_cos(jnp.asarray([[i]]), frequency))
        b = rotary.rotate(k, *rotary.rope_sin_cos(jnp.asarray([[j]]), frequency))
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(q), rel=1e-6)
        return float(jnp.sum(a * b))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-4)


PROMPTS = [
    np.random.default_rng(length).integers(1, VOCAB, length).astype(np.int32)
    for length in (3, 11, 34, 1)
]


def continued(
    graph: decoder.Graph, params: decoder.Params, eos_ids: tuple[int, ...]
) -> list[np.ndarray]:
    limits = [12] * len(PROMPTS)
    made = generation.generate(graph, params, PROMPTS, limits=limits, eos_ids=eos_ids, pad_id=0)
    return [completion.ids for completion in made]


def test_a_completion_depends_on_its_own_prompt_and_limit(
    model: tuple[decoder.Graph, decoder.Params],
) -> None:
    """Beside others of other lengths and limits it is what it is alone; one that its limit ended
    says so."""
    limits = [3 + 4 * n for n in range(len(PROMPTS))]
    together = generation.generate(*model, PROMPTS, limits=limits, eos_ids=(0,), pad_id=0)
    for prompt, limit, found in zip(PROMPTS, limits, together, strict=True):
        (alone,) = generation.generate(*model, [prompt], limits=[limit], eos_ids=(0,), pad_id=0)
        assert found.ids.tolist() == alone.ids.tolist()
        assert found.cut_off == alone.cut_off == (len(found.ids) == limit)
        ends = (int(found.ids[-1]),)
        (ended,) = generation.generate(*model, [prompt], limits=[99], eos_ids=ends, pad_id=0)
        first = found.ids.tolist().index(ends[0])
        assert (ended.ids.tolist(), ended.cut_off) == (found.ids.tolist()[:first], False)


def test_cached_generation_is_greedy_decoding(
    model: tuple[decoder.Graph, decoder.Params],
) -> None:
    """The cache, the left padding and the batch change no token."""
    for prompt, completion in zip(PROMPTS, continued(*model, eos_ids=(0,)), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            token = int(np.argmax(logits(*model, np.asarray(tokens, np.int32))[-1]))
            if token == 0:
                break
            tokens.append(token)
        assert list(completion) == tokens[len(prompt) :]


def test_generation_stops_at_the_end_of_sequence() -> None:
    """Nothing follows the token that ends, and it is not returned."""
    model = built("grouped, tied")
    tokens = list(continued(*model, eos_ids=(0,))[0])
    stop = int(tokens[3])
    assert list(continued(*model, eos_ids=(stop,))[0]) == tokens[: tokens.index(stop)]


TOKENS = np.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
SEGMENTS = np.asarray([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
ROW = Batch(TOKENS, TOKENS + 1, np.arange(8, dtype=np.int32)[None], SEGMENTS, SEGMENTS > 0)


@lru_cache
def loss_and_gradient(
    config: ModelConfig, *, fused: bool = False, scanned: bool = False, remat: str = "none"
) -> tuple[float, list[np.ndarray]]:
    """Of the parameters of the plain form, whatever form computes them."""
    params = decoder.build(config, VOCAB, seed=2)[1]
    graph, target = decoder.shape(config, VOCAB, fused=fused, scanned=scanned)

    @jax.jit
    @jax.value_and_grad
    def loss(params: decoder.Params) -> jax.Array:
        formed = decoder.fuse(params, config) if fused else params
        formed = decoder.stack(formed) if scanned else formed
        assert structure(formed) == structure(target)
        for leaf, expected in zip(jax.tree.leaves(formed), jax.tree.leaves(target), strict=True):
            assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        return token_losses(graph, formed, ROW, PrecisionPolicy(remat=remat))[0]

    value, gradient = loss(params)
    return float(value), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


def structure(tree: object) -> Any:
    """A PyTreeDef; jax's types do not say what its == returns."""
    return jax.tree.structure(tree)


def assert_same(one: tuple[float, list[np.ndarray]], other: tuple[float, list[np.ndarray]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        assert np.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_fused_form_computes_the_same(name: str) -> None:
    """Losses, and gradients through `fuse`."""
    assert_same(loss_and_gradient(SHAPES[name], fused=True), loss_and_gradient(SHAPES[name]))


# Each pair of form, windows and rematerialization, not each triple.
@pytest.mark.parametrize(
    ("fused", "windowed", "remat"),
    [
        *((False, False, "none"), (True, True, "none")),
        *((True, False, "dots"), (False, True, "dots")),
        *((False, True, "block"), (True, False, "block")),
    ],
)
def test_the_scanned_form_computes_the_same(fused: bool, windowed: bool, remat: str) -> None:
    """Losses, and gradients through `stack`; windows are those of their layers."""
    config = WINDOWED if windowed else SHAPES["grouped, tied"]
    assert_same(
        loss_and_gradient(config, fused=fused, scanned=True, remat=remat),
        loss_and_gradient(config),
    )


def test_unstack_undoes_stack() -> None:
    """The same structure and the same bits."""
    params = built("grouped, tied")[1]
    result = decoder.unstack(decoder.stack(params))
    assert structure(result) == structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(result), strict=True):
        assert np.array_equal(a, b)


def test_remat_saves_memory_on_a_cpu() -> None:
    """What is recomputed is not kept, in the scanned form."""
    config = ModelConfig(layers=8, width=32, heads=4, kv_heads=4, mlp_width=128)
    graph, target = decoder.shape(config, VOCAB, scanned=True)
    batch = batches.blank(1, 128)

    def temporaries(remat: str) -> int:
        def loss(params: decoder.Params) -> jax.Array:
            return token_losses(graph, params, batch, PrecisionPolicy(remat=remat))[0]

        compiled = jax.jit(jax.grad(loss)).lower(target).compile()
        sizes = compiled.memory_analysis()
        assert sizes is not None
        return int(sizes.temp_size_in_bytes)

    kept = {remat: temporaries(remat) for remat in ("none", "dots", "block")}
    assert kept["block"] < kept["none"] / 2
    assert kept["block"] < kept["dots"] < kept["none"]


def value_and_gradients(
    f: Callable[..., jax.Array], *arguments: np.ndarray, cotangent: np.ndarray | None = None
) -> list[jax.Array]:
    """Of a function of arrays, as one program; by default of the sum of its sines."""

    @jax.jit
    def both(*arguments: jax.Array) -> list[jax.Array]:
        value, backward = jax.vjp(f, *arguments)
        return [value, *backward(jnp.cos(value) if cotangent is None else cotangent)]

    result: list[jax.Array] = both(*arguments)
    return result


@pytest.mark.parametrize(
    ("heads", "groups", "length", "seen", "causal"),
    [(4, 2, 8, 8, False), (6, 1, 1, 12, False), (4, 2, 256, 256, True), (2, 2, 512, 512, True)],
)
def test_attention_is_the_librarys(
    heads: int, groups: int, length: int, seen: int, causal: bool
) -> None:
    """In value and gradient, with a mask: self-attention, in one block and in several, and one
    token with a cache."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, length, heads, 16), np.float32)
    k, v = rng.standard_normal((2, 2, seen, groups, 16), np.float32)
    mask = np.arange(seen)[None, None, None] <= np.arange(length)[:, None] + seen - length
    mask = np.broadcast_to(mask, (2, 1, length, seen))

    def library(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return cpu_kernels.dot_product_attention(q, k, v, jnp.asarray(mask), causal=causal)

    (value, *gradients), (expected, *expected_gradients) = (
        value_and_gradients(f, q, k, v) for f in (ours, library)
    )
    assert np.allclose(value, expected, atol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert np.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blockwise_attention_is_that_of_one_block(dtype: str) -> None:
    """Of packed rows with a window, in value and gradient."""
    rng = np.random.default_rng(0)
    q, cotangent = rng.standard_normal((2, 2, 512, 4, 16), np.float32).astype(jnp.dtype(dtype))
    k, v = rng.standard_normal((2, 2, 512, 2, 16), np.float32).astype(jnp.dtype(dtype))
    segments = np.repeat(np.asarray([[1, 1, 2, 0], [1, 2, 3, 3]]), 128, axis=1)
    near = np.arange(512)[:, None] - np.arange(512)[None] < 200
    mask = decoder.segment_mask(jnp.asarray(segments)) & near

    def values(*, causal: bool) -> list[jax.Array]:
        attend = partial(cpu_kernels.dot_product_attention, mask=mask, causal=causal)
        return value_and_gradients(attend, q, k, v, cotangent=cotangent)

    assert cpu_kernels._block_count(512) > 1
    for one, blocks in zip(values(causal=False), values(causal=True), strict=True):
        assert blocks.dtype == one.dtype
        tolerance = 1e-5 if dtype == "float32" else 0.1
        a, b = np.asarray(one, np.float32), np.asarray(blocks, np.float32)
        assert np.allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_is_the_librarys(dtype: str) -> None:
    """In value and gradient, weighted."""
    logits = (9 * np.random.default_rng(0).standard_normal((5, 33))).astype(jnp.dtype(dtype))
    targets, mask = np.asarray([0, 32, 4, 4, 9]), np.asarray([1, 1, 0, 1, 0.5], np.float32)

    def library(logits: jax.Array) -> jax.Array:
        wide = logits.astype(jnp.float32)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(wide, targets) * mask)

    def ours(logits: jax.Array) -> jax.Array:
        return cross_entropy(logits, targets, mask)

    (a, up), (b, down) = (
        jax.jit(jax.value_and_grad(lambda x, f=f: f(x) ** 2))(logits) for f in (library, ours)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    assert down.dtype == logits.dtype
    up, down = np.asarray(up, np.float32), np.asarray(down, np.float32)
    assert np.allclose(up, down, rtol=1e-2, atol=1e-4)


def test_the_seed_makes_the_parameters() -> None:
    """Same seed same bits, another seed others."""
    config = SHAPES["grouped, tied"]
    a, b, c = (jax.tree.leaves(decoder.build(config, VOCAB, s)[1]) for s in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


@lru_cache
def data() -> TokenRows:
    examples = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 9)]
    return lay_out_rows(
        encode_examples(examples, ByteTokenizer(), DataConfig()), DataConfig(), LENGTH
    )


def new_trainer(spec: StepSpec, params: decoder.Params) -> Trainer:
    device = jax.local_devices(backend="cpu")[0]
    initial = InitialState(init_state(spec, params, device), None, None)
    return Trainer(Config(), ByteTokenizer.vocab_size, device, spec, initial)


@lru_cache
def of_bytes() -> tuple[decoder.Graph, decoder.Params]:
    return decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)


def test_loss_is_that_of_the_trained_tokens() -> None:
    """The masked mean equals one computed token by token without packing."""
    graph, params = of_bytes()
    rows = data()
    spec = StepSpec(graph, optax.identity())
    total, count = step.eval_step(params, batches.assemble(rows, rows.rows), spec=spec)
    expected, tokens = 0.0, 0
    for ids, trained in (rows.example(index) for index in range(rows.examples.count)):
        raw = logits(graph, params, ids[:-1]).astype(np.float64)
        log_probabilities = raw - np.log(np.sum(np.exp(raw), axis=-1, keepdims=True))
        for position in np.flatnonzero(trained[1:]):
            expected -= float(log_probabilities[position, ids[1:][position]])
            tokens += 1
    assert int(count) == tokens
    assert float(total) == pytest.approx(expected, rel=1e-5)


@partial(jax.jit, static_argnames=("graph", "policy"))
def gradient(
    graph: decoder.Graph, params: decoder.Params, batch: Batch, policy: PrecisionPolicy
) -> decoder.Params:
    def mean(params: decoder.Params) -> jax.Array:
        total, count = token_losses(graph, params, batch, policy)
        return total / count

    result: decoder.Params = jax.grad(mean)(params)
    return result


def gradients(rows: list[list[int]], policy: PrecisionPolicy = FLOAT32) -> list[jax.Array]:
    return jax.tree.leaves(gradient(*of_bytes(), batches.assemble(data(), rows), policy))


def test_packing_changes_no_gradient() -> None:
    """The gradient of packed rows is that of the same examples one a row."""
    one_each = [[i] for i in range(data().examples.count)]
    for a, b in zip(gradients(data().rows), gradients(one_each), strict=True):
        assert np.allclose(a, b, atol=1e-6)


# Chunks that do not divide the tokens, that do, and one that holds them all.
@pytest.mark.parametrize(
    "policy",
    [
        PrecisionPolicy(remat="block", loss_chunk=7),
        PrecisionPolicy(remat="dots", loss_chunk=64),
        PrecisionPolicy(remat="block", loss_chunk=100_000),
    ],
)
def test_saving_memory_changes_no_gradient(policy: PrecisionPolicy) -> None:
    """What is recomputed, or computed in chunks, is the same up to rounding."""
    for a, b in zip(gradients(data().rows, policy), gradients(data().rows), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)


@lru_cache
def update_rule(name: str) -> optax.GradientTransformation:
    return optimizers.build(OptimizerConfig(name=name, warmup_steps=0), 10)  # type: ignore[arg-type]


class Updates(NamedTuple):
    """Of two updates on one batch."""

    states: list[TrainState]  # before the first and after each, as NumPy arrays
    metrics: list[StepMetrics]


@lru_cache
def updates(
    name: str, *, parts: int = 4, params_dtype: str = "float32", dtype: str = "float32"
) -> Updates:
    """Two updates of the fused form.

    Args:
        name: of the optimizer.
        parts: microbatches of the eight rows.
        params_dtype: of parameters and optimizer state.
        dtype: of the matmuls.
    """
    config, vocabulary = SHAPES["one head, untied"], ByteTokenizer.vocab_size
    graph = decoder.shape(config, vocabulary, fused=True)[0]
    rule = update_rule(name)
    spec = StepSpec(graph, rule, parts, policy=PrecisionPolicy(dtype), fuse=config)
    batch = batches.assemble(data(), [[i] for i in range(8)])
    params = decoder.init(config, vocabulary, 0)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(params_dtype)), params)
    trainer = new_trainer(spec, params)
    result = Updates([jax.tree.map(np.array, trainer.state)], [])
    for _ in range(2):
        result.metrics.append(trainer.step(batch))
        result.states.append(jax.tree.map(np.array, trainer.state))
    return result


def test_bfloat16_is_near() -> None:
    """Parameters keep their type, and the update is that of float32 but for few bits."""
    exact, near = updates("adamw"), updates("adamw", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(near.states[1].params)} == {jnp.dtype("float32")}
    m1, m2 = exact.metrics[0], near.metrics[0]
    assert float(m1.loss) != float(m2.loss)
    assert float(m1.loss) == pytest.approx(float(m2.loss), rel=2e-2)
    assert float(m1.grad_norm) == pytest.approx(float(m2.grad_norm), rel=5e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bfloat16_parameters_keep_their_type(name: str) -> None:
    """Two updates of parameters and optimizer state; losses near float32's."""
    exact, near = updates(name), updates(name, params_dtype="bfloat16")
    before, after = ([leaf.dtype for leaf in jax.tree.leaves(s)] for s in near.states[::2])
    assert jnp.dtype("bfloat16") in before
    assert after == before
    losses, expected = ([float(m.loss) for m in u.metrics] for u in (near, exact))
    assert losses == pytest.approx(expected, rel=3e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_microbatches_change_no_update(name: str) -> None:
    """Parts of unequal token counts give the update of the whole batch."""
    whole, split = updates(name, parts=1), updates(name)
    m1, m2 = whole.metrics[0], split.metrics[0]
    assert float(m1.loss) == pytest.approx(float(m2.loss), rel=1e-5)
    assert float(m1.trained_tokens) == float(m2.trained_tokens)
    pairs = (jax.tree.leaves(u.states[1].params) for u in (whole, split))
    for a, b in zip(*pairs, strict=True):
        assert np.allclose(a, b, atol=2e-3 if name == "muon" else 1e-4)


def test_a_step_is_compiled_once() -> None:
    """After `compile` neither the first step nor those after it, nor a last partial batch, compile
    anything."""
    config = SHAPES["one head, untied"]
    graph, params = decoder.build(config, ByteTokenizer.vocab_size, 0)
    rule = optimizers.build(OptimizerConfig(), 10)  # its own, which no other test has compiled
    trainer = new_trainer(StepSpec(graph, rule, 2), params)
    full = batches.assemble(data(), [[i] for i in range(8)])
    partial = batches.assemble(data(), [[i] for i in range(5)] + [[]] * 3)
    compiled: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    trainer.compile(full)
    before = len(compiled)
    for batch in (full, full, partial):
        trainer.step(batch)
    assert len(compiled) == before == 1


def is_muon(state: object) -> bool:
    return isinstance(state, optax.contrib.MuonState)


def test_muon_takes_the_hidden_matrices_alone() -> None:
    """Embedding and norms are AdamW's; both kinds move."""
    states = updates("muon").states
    (muon,) = (
        inner for inner in jax.tree.leaves(states[0].opt_state, is_leaf=is_muon) if is_muon(inner)
    )
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(muon.mu)[0]]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}
    attention, mlp = ("queries", "keys", "values", "output"), ("gate", "up", "down")
    assert names == {
        *(f"blocks/0/attention/{name}/kernel/value" for name in attention),
        *(f"blocks/0/mlp/{name}/kernel/value" for name in mlp),
    }
    before, after = (jax.tree.leaves(state.params) for state in states[:2])
    for a, b in zip(before, after, strict=True):
        assert not np.array_equal(a, b)


def test_schedule_warms_up_and_decays() -> None:
    """From 1/n of the peak over the peak to exactly the final fraction, in a short run too."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, final_fraction=0.1)
    rates = optimizers.learning_rates(config, 100)
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 100)
    assert rates[-1] == pytest.approx(0.01)
    assert np.all(np.diff(rates[9:]) < 0)
    for steps in (2, 3, 4, 10, 12):
        rates = optimizers.learning_rates(config, steps)
        assert rates[0] == pytest.approx(0.1 / min(10, steps // 2))
        assert rates.max() == pytest.approx(0.1)
        assert rates[-1] == pytest.approx(0.01)
    assert optimizers.learning_rates(config, 1) > 0
    constant = OptimizerConfig(learning_rate=0.1, warmup_steps=0, final_fraction=1.0)
    assert optimizers.learning_rates(constant, 5) == pytest.approx(0.1)


def test_more_steps_stretch_the_schedule() -> None:
    """That is told, with the key that keeps it; with that, the rate stays where it was."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
    said = optimizers.change_of_rate(20, (config, 20), (config, 100))
    assert said is not None
    assert "had a learning rate of 0.01, and update 21 has 0.0919" in said
    assert "optimizer.schedule_steps=20" in said
    kept = msgspec.structs.replace(config, schedule_steps=20)
    assert optimizers.change_of_rate(20, (config, 20), (kept, 100)) is None
    rates = optimizers.learning_rates(kept, 100)
    assert rates[:20] == pytest.approx(optimizers.learning_rates(config, 20))
    assert rates[20:] == pytest.approx(0.01)
    other = msgspec.structs.replace(config, schedule_steps=400)
    said = optimizers.change_of_rate(20, (config, 20), (other, 40))
    assert said is not None
    assert "optimizer.schedule_steps=400 changes the schedule" in said
    assert "optimizer.schedule_steps=20 keeps" in said
    assert optimizers.change_of_rate(20, (config, 20), (config, 20)) is None
    # A schedule that goes on is no change; one that has not ended keeps more than its last rate.
    hundred = msgspec.structs.replace(config, schedule_steps=100)
    assert optimizers.change_of_rate(90, (hundred, 90), (hundred, 95)) is None
    thirty = msgspec.structs.replace(config, schedule_steps=30)
    said = optimizers.change_of_rate(40, (hundred, 40), (thirty, 60))
    assert said is not None
    assert said.endswith("optimizer.schedule_steps=100 keeps the schedule of 100 steps")
    assert optimizers.change_of_rate(0, (config, 20), (config, 100)) is None


def test_batch_is_a_pytree() -> None:
    """jit sees five arrays."""
    zeros = np.zeros((1, 2), np.int32)
    assert len(jax.tree.leaves(Batch(zeros, zeros, zeros, zeros, zeros > 0))) == 5
