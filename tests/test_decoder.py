"""The decoder and generation, against plain computations."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tunix_mlflow.config.schema import DataConfig, ModelConfig, OptimizerConfig
from tunix_mlflow.data.examples import reasoning_trace
from tunix_mlflow.input import batches, tokens
from tunix_mlflow.input.batches import Batch
from tunix_mlflow.input.packing import TokenRows, lay_out_rows
from tunix_mlflow.models import decoder, generation, layers
from tunix_mlflow.text.byte_tokenizer import ByteTokenizer
from tunix_mlflow.training import optimizer as optimizers
from tunix_mlflow.training import step
from tunix_mlflow.training.losses import FLOAT32, PrecisionPolicy, cross_entropy, token_losses

SHAPES = {
    "grouped, tied": ModelConfig(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24),
    "one head, untied": ModelConfig(
        layers=1, width=12, heads=1, kv_heads=1, mlp_width=8, tie_embeddings=False
    ),
    "odd head width": ModelConfig(
        layers=2, width=10, heads=3, kv_heads=1, head_dim=6, mlp_width=20
    ),
}
VOCAB = 40


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> tuple[decoder.Graph, decoder.Params]:
    return decoder.build(SHAPES[request.param], VOCAB, seed=1)


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

    frequency = layers.frequencies(8, 10_000.0)

    def score(i: int, j: int) -> float:
        a = layers.rotate(q, *layers.rope_sin_cos(jnp.asarray([[i]]), frequency))
        b = layers.rotate(k, *layers.rope_sin_cos(jnp.asarray([[j]]), frequency))
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(q), rel=1e-6)
        return float(jnp.sum(a * b))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-4)


def test_cached_generation_is_greedy_decoding(
    model: tuple[decoder.Graph, decoder.Params],
) -> None:
    """The cache, the left padding and the batch change no token."""
    graph, params = model
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, VOCAB, n).astype(np.int32) for n in (3, 11, 34, 1)]
    made = generation.generate(graph, params, prompts, max_new_tokens=12, eos_ids=(0,), pad_id=0)
    for prompt, found in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            token = int(np.argmax(logits(graph, params, np.asarray(tokens, np.int32))[-1]))
            if token == 0:
                break
            tokens.append(token)
        assert list(found) == tokens[len(prompt) :]


def test_generation_stops_at_the_end_of_sequence() -> None:
    """Nothing follows the token that ends, and it is not returned."""
    graph, params = decoder.build(SHAPES["grouped, tied"], VOCAB, seed=1)
    prompt = np.asarray([5, 6, 7], np.int32)
    free = generation.generate(graph, params, [prompt], max_new_tokens=8, eos_ids=(39,), pad_id=0)[
        0
    ]
    stop = int(free[3])
    cut = generation.generate(graph, params, [prompt], max_new_tokens=8, eos_ids=(stop,), pad_id=0)[
        0
    ]
    assert list(cut) == list(free)[: list(free).index(stop)]


@pytest.mark.parametrize("name", SHAPES)
def test_the_fused_form_computes_the_same(name: str) -> None:
    """Logits, and gradients taken back through `fuse`."""
    config = SHAPES[name]
    graph, params = decoder.build(config, VOCAB, seed=2)
    fused, target = decoder.shape(config, VOCAB, fused=True)
    made = decoder.fuse(params, config)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(target)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)] == shapes
    assert jax.tree.structure(made) == jax.tree.structure(target)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    positions, mask = jnp.arange(8)[None], decoder.segment_mask(segments)

    def of(form: decoder.Graph, state: decoder.Params) -> jax.Array:
        return jnp.sin(nnx.merge(form, state)(tokens, positions, mask)[0])

    assert np.allclose(of(graph, params), of(fused, made), atol=1e-5)
    plain = jax.grad(lambda p: of(graph, p).sum())(params)
    back = jax.grad(lambda p: of(fused, decoder.fuse(p, config)).sum())(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(back), strict=True):
        assert np.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("windowed", [(), (0, 2)])
def test_the_scanned_form_computes_the_same(fused: bool, windowed: tuple[int, ...]) -> None:
    """Losses, and gradients taken back through `stack`; windows are those of their layers."""
    config = ModelConfig(
        layers=3,
        width=16,
        kv_heads=2,
        mlp_width=24,
        window=3 if windowed else None,
        windowed_layers=windowed,
        window_rope_theta=100.0 if windowed else None,
    )
    params = decoder.build(config, VOCAB, seed=2)[1]
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 0]], jnp.int32)
    batch = batches.Batch(tokens, tokens + 1, jnp.arange(8)[None], segments, segments > 0)

    def of(params: decoder.Params, *, scanned: bool, remat: str = "none") -> jax.Array:
        graph, target = decoder.shape(config, VOCAB, fused=fused, scanned=scanned)
        formed = decoder.fuse(params, config) if fused else params
        formed = decoder.stack(formed) if scanned else formed
        assert jax.tree.structure(formed) == jax.tree.structure(target)
        assert jax.tree.map(jnp.shape, formed) == jax.tree.map(jnp.shape, target)
        return token_losses(graph, formed, batch, PrecisionPolicy(remat=remat))[0]

    value, plain = jax.value_and_grad(partial(of, scanned=False))(params)
    for remat in ("none", "dots", "block"):
        same, back = jax.value_and_grad(partial(of, scanned=True, remat=remat))(params)
        assert float(same) == pytest.approx(float(value), rel=1e-5)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(back), strict=True):
            assert np.allclose(a, b, rtol=1e-3, atol=1e-5)
    again = decoder.unstack(decoder.stack(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert np.array_equal(a, b)


def test_remat_saves_memory_on_a_cpu() -> None:
    """What is computed again is not kept, in the scanned form."""
    config = ModelConfig(layers=8, width=64, heads=4, kv_heads=4, mlp_width=256)
    graph, target = decoder.shape(config, VOCAB, scanned=True)
    batch = batches.blank(1, 256)

    def temporaries(remat: str) -> int:
        def of(params: decoder.Params) -> jax.Array:
            return token_losses(graph, params, batch, PrecisionPolicy(remat=remat))[0]

        compiled = jax.jit(jax.grad(of)).lower(target).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    kept = {remat: temporaries(remat) for remat in ("none", "dots", "block")}
    assert kept["block"] < kept["none"] / 2
    assert kept["block"] < kept["dots"] < kept["none"]


@pytest.mark.parametrize(
    ("heads", "groups", "length", "seen", "causal"),
    [(4, 2, 8, 8, False), (6, 1, 1, 12, False), (4, 2, 256, 256, True), (2, 2, 512, 512, True)],
)
def test_attention_is_the_librarys(
    heads: int, groups: int, length: int, seen: int, causal: bool
) -> None:
    """In value and gradient, with a mask, for self-attention, whole and in pieces, and for one
    token and a cache."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, heads, 16))
    k, v = (jax.random.normal(key, (2, seen, groups, 16)) for key in keys[1:])
    mask = jnp.arange(seen)[None, None, None] <= jnp.arange(length)[:, None] + seen - length
    mask = jnp.broadcast_to(mask, (2, 1, length, seen))

    def library(*arrays: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*arrays, mask=mask)

    def ours(*arrays: jax.Array) -> jax.Array:
        return layers.attend(*arrays, mask, causal=causal)

    assert np.allclose(library(q, k, v), ours(q, k, v), atol=1e-6)
    gradients = [
        jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2))(q, k, v) for f in (library, ours)
    ]
    for a, b in zip(*gradients, strict=True):
        assert np.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_pieces_is_that_of_the_whole(dtype: str) -> None:
    """Of packed rows with a window, in value and gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, up = (jax.random.normal(key, (2, 512, 4, 16)).astype(dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 512, 2, 16)).astype(dtype) for key in keys[2:])
    segments = jnp.repeat(jnp.asarray([[1, 1, 2, 0], [1, 2, 3, 3]]), 128, axis=1)
    near = jnp.arange(512)[:, None] - jnp.arange(512)[None] < 200
    mask = decoder.segment_mask(segments) & near

    def of(*, causal: bool) -> list[jax.Array]:
        found, back = jax.vjp(lambda *x: layers.attend(*x, mask, causal=causal), q, k, v)
        return [found, *back(up)]

    assert layers._block_count(512) > 1
    for whole, pieces in zip(of(causal=False), of(causal=True), strict=True):
        assert pieces.dtype == whole.dtype
        near_enough = 1e-5 if dtype == "float32" else 0.1
        wide, other = whole.astype(jnp.float32), pieces.astype(jnp.float32)
        assert np.allclose(wide, other, atol=near_enough)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_is_the_librarys(dtype: str) -> None:
    """In value and gradient, weighed."""
    logits = (9 * jax.random.normal(jax.random.key(0), (5, 33))).astype(dtype)
    targets, mask = jnp.asarray([0, 32, 4, 4, 9]), jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.5])

    def library(logits: jax.Array) -> jax.Array:
        wide = logits.astype(jnp.float32)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(wide, targets) * mask)

    def ours(logits: jax.Array) -> jax.Array:
        return cross_entropy(logits, targets, mask)

    (a, up), (b, down) = (
        jax.value_and_grad(lambda x, f=f: f(x) ** 2)(logits) for f in (library, ours)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    assert down.dtype == logits.dtype
    assert np.allclose(up.astype(jnp.float32), down.astype(jnp.float32), rtol=1e-2, atol=1e-4)


def test_the_seed_makes_the_parameters() -> None:
    """Same seed same bits, another seed others."""
    config = SHAPES["grouped, tied"]
    a, b, c = (jax.tree.leaves(decoder.build(config, VOCAB, s)[1]) for s in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.fixture
def data() -> TokenRows:
    examples = [reasoning_trace(f"n{n}", [("t", "s" * n)], f"{n}").example() for n in range(1, 9)]
    tokenized = tokens.encode_examples(examples, ByteTokenizer(), True)
    return lay_out_rows(tokenized, DataConfig(), 64)


def test_loss_is_that_of_the_trained_tokens(data: TokenRows) -> None:
    """The masked mean equals one computed token by token without packing."""
    graph, params = decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)
    spec = step.StepSpec(graph, optax.identity())
    total, count = step.eval_step(params, batches.assemble(data, data.rows), spec=spec)
    expected, trained_tokens = 0.0, 0
    for index in range(data.examples.count):
        ids, trained = data.example(index)
        raw = logits(graph, params, ids[:-1]).astype(np.float64)
        found = raw - np.log(np.sum(np.exp(raw), axis=-1, keepdims=True))
        for place in np.flatnonzero(trained[1:]):
            expected -= float(found[place, ids[1:][place]])
            trained_tokens += 1
    assert int(count) == trained_tokens
    assert float(total) == pytest.approx(expected, rel=1e-5)


def gradients(
    data: TokenRows, rows: list[list[int]], compute: PrecisionPolicy = FLOAT32
) -> decoder.Params:
    graph, params = decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)

    def mean(params: decoder.Params) -> jax.Array:
        total, count = token_losses(graph, params, batches.assemble(data, rows), compute)
        return total / count

    return jax.jit(jax.grad(mean))(params)


def test_packing_changes_no_gradient(data: TokenRows) -> None:
    """The gradient of packed rows is that of the same examples one a row."""
    one_each = [[i] for i in range(data.examples.count)]
    pairs = zip(
        jax.tree.leaves(gradients(data, data.rows)),
        jax.tree.leaves(gradients(data, one_each)),
        strict=True,
    )
    assert all(np.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize(
    "compute",
    [
        PrecisionPolicy(remat="block"),
        PrecisionPolicy(remat="dots"),
        PrecisionPolicy(loss_chunk=7),
        PrecisionPolicy(loss_chunk=64),
        PrecisionPolicy(remat="block", loss_chunk=100_000),
    ],
)
def test_saving_memory_changes_no_gradient(data: TokenRows, compute: PrecisionPolicy) -> None:
    """What is computed again, or a chunk at a time, is the same up to rounding."""
    for a, b in zip(
        jax.tree.leaves(gradients(data, data.rows, compute)),
        jax.tree.leaves(gradients(data, data.rows)),
        strict=True,
    ):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_near(data: TokenRows) -> None:
    """Parameters keep their type, and the update is that of float32 but for few bits."""

    def after(dtype: str) -> tuple[step.TrainState, step.StepMetrics]:
        graph, params = decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)
        rule = optimizers.build(OptimizerConfig(warmup_steps=0), 10)
        spec = step.StepSpec(graph, rule, 2, None, PrecisionPolicy(dtype))
        batch = batches.assemble(data, [[i] for i in range(8)])
        return step.train_step(step.init_state(params, rule), batch, spec=spec)

    (_, m1), (near, m2) = after("float32"), after("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(near.params)} == {jnp.dtype("float32")}
    assert float(m1.loss) != float(m2.loss)
    assert float(m1.loss) == pytest.approx(float(m2.loss), rel=2e-2)
    assert float(m1.grad_norm) == pytest.approx(float(m2.grad_norm), rel=5e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bfloat16_parameters_keep_their_type(data: TokenRows, name: str) -> None:
    """Two updates of the fused form, of parameters and optimizer state; losses near float32's."""
    config = SHAPES["grouped, tied"]
    vocabulary = ByteTokenizer.vocab_size
    rule = optimizers.build(OptimizerConfig(name=name, warmup_steps=0), 10)  # type: ignore[arg-type]
    graph = decoder.shape(config, vocabulary, fused=True)[0]
    spec = step.StepSpec(graph, rule, 2, fuse=config)
    batch = batches.assemble(data, [[i] for i in range(8)])
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        made = decoder.build(config, vocabulary, 0)[1]
        state = step.init_state(jax.tree.map(lambda x, t=dtype: x.astype(t), made), rule)
        types = [leaf.dtype for leaf in jax.tree.leaves(state)]
        for _ in range(2):
            state, metrics = step.train_step(state, batch, spec=spec)
            losses.setdefault(dtype, []).append(float(metrics.loss))
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == types
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=3e-2)


@pytest.mark.parametrize(("name", "microbatches"), [("adamw", 2), ("muon", 4)])
def test_microbatches_change_no_update(data: TokenRows, name: str, microbatches: int) -> None:
    """Parts of unequal token counts give the update of the whole batch."""

    def after(parts: int) -> tuple[step.TrainState, step.StepMetrics]:
        graph, params = decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)
        rule = optimizers.build(OptimizerConfig(name=name, warmup_steps=0), 10)  # type: ignore[arg-type]
        batch = batches.assemble(data, [[i] for i in range(8)])
        spec = step.StepSpec(graph, rule, parts)
        return step.train_step(step.init_state(params, rule), batch, spec=spec)

    (whole, m1), (split, m2) = after(1), after(microbatches)
    assert float(m1.loss) == pytest.approx(float(m2.loss), rel=1e-5)
    assert float(m1.trained_tokens) == float(m2.trained_tokens)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True):
        assert np.allclose(a, b, atol=2e-3 if name == "muon" else 1e-4)


def test_a_step_is_compiled_once(data: TokenRows) -> None:
    """After compile_step neither the first step nor those after it, nor a last partial batch,
    compile anything."""
    graph, params = decoder.build(SHAPES["grouped, tied"], ByteTokenizer.vocab_size, 0)
    rule = optimizers.build(OptimizerConfig(), 10)
    spec = step.StepSpec(graph, rule, 2)
    state = step.init_state(params, rule)
    full = batches.assemble(data, [[i] for i in range(8)])
    partial = batches.assemble(data, [[i] for i in range(5)] + [[]] * 3)
    compiled: list[str] = []

    def heard(event: str, _: float, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    step.compile_step(state, full, spec=spec)
    before = len(compiled)
    for batch in (full, full, partial):
        state, _ = step.train_step(state, batch, None, spec=spec)
    assert len(compiled) == before == 1


def test_muon_takes_the_hidden_matrices_alone() -> None:
    """Embedding and norms are AdamW's; both kinds move."""
    _, params = decoder.build(SHAPES["grouped, tied"], VOCAB, 0)
    rule = optimizers.build(OptimizerConfig(name="muon", warmup_steps=0), 10)
    state = jax.jit(rule.init)(params)
    text = str(jax.tree_util.tree_structure(state))
    assert "MuonState" in text
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(rule.update)(grads, state, params)
    moved = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert not np.array_equal(a, b)


def test_schedule_warms_up_and_decays() -> None:
    """From near 0 over the peak to the final fraction."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, final_fraction=0.1)
    rates = optimizers.learning_rates(config, 100)
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01, rel=0.05)
    assert np.all(np.diff(rates[10:]) <= 0)


def test_batch_is_a_pytree() -> None:
    """jit sees five arrays."""
    arrays = [np.zeros((1, 2), np.int32)] * 4 + [np.zeros((1, 2), np.bool_)]
    assert len(jax.tree.leaves(Batch(*arrays))) == 5
