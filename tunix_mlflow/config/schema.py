"""The configuration's schema: strict, frozen sections, a docstring with unit and range under each
key.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Above0 = Annotated[float, Meta(gt=0.0)]
AtLeast0 = Annotated[float, Meta(ge=0.0)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class DataConfig(_Section, frozen=True):
    """How examples become rows of tokens."""

    include_steps: bool = True
    """Train on the reasoning steps before the answer; false: on the answer alone."""
    sequence_length: Annotated[int, Meta(ge=16, le=131_072)] | None = None
    """Tokens in a row; null: the smallest multiple of 128 that holds the longest example."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What to do with an example that is longer than a row; counts are reported."""
    packing: bool = True
    """Put several examples into one row, kept apart by segment ids."""
    train_split: str = "train"
    """The split that is trained on."""
    leakage: Literal["refuse", "record"] = "refuse"
    """When a prompt that is evaluated on is trained on: do not train, or say so on the run."""
    evaluation_sets: tuple[str, ...] = ()
    """Datasets to look for in the training split, by prompts and by 8-grams; see
    `tunix-mlflow datasets check-leakage`."""


class LimitsConfig(_Section, frozen=True):
    """What ingest takes; an example beyond a limit is a bad line."""

    prompt_characters: Positive = 50_000
    """Longest prompt, and longest message that is not the assistant's."""
    answer_characters: Positive = 50_000
    """Longest answer, completion or text."""
    steps: Positive = 1_000
    """Most reasoning steps."""
    step_characters: Positive = 20_000
    """Longest reasoning step."""
    type_characters: Positive = 64
    """Longest type of a step."""
    body_bytes: Positive = 1_000_000
    """Longest line, or row as JSON."""


class RopeScaling(_Section, frozen=True):
    """Rotary positions that are stretched for a longer context."""

    kind: Literal["linear", "llama3"]
    """All alike, or as Llama 3.1: long waves by `factor`, short ones not, between them in part."""
    factor: Above0
    """How far."""
    low_freq_factor: Above0 = 1.0
    """llama3: a wave that turns fewer times than this in the first context is long."""
    high_freq_factor: Above0 = 4.0
    """llama3: a wave that turns more often is short."""
    original_positions: Positive = 8192
    """llama3: the first context."""


class ModelConfig(_Section, frozen=True):
    """The decoder's shape."""

    family: Literal["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"] = "llama"
    """What it is made of: as llama; with biases of queries, keys and values (qwen2); with norms of
    queries and keys (qwen3); with a gated GELU, norms of what is added, norms that scale by
    1 + weight and embeddings times sqrt(width) (gemma2); all but the biases (gemma3_text)."""
    layers: Positive = 2
    """Number of blocks."""
    width: Positive = 128
    """Width of the residual stream."""
    heads: Positive = 4
    """Query heads; must divide by kv_heads."""
    kv_heads: Positive = 2
    """Key/value heads (grouped-query attention)."""
    head_dim: Positive | None = None
    """Width of one head, even; null: width / heads."""
    mlp_width: Positive = 352
    """Hidden width of the gated feed-forward."""
    rope_theta: Above0 = 10_000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretched positions; null: as they are."""
    tie_embeddings: bool = True
    """Use the embedding table as the output projection."""
    norm_epsilon: Above0 = 1e-6
    """Added to the mean square in RMSNorm."""
    window: Positive | None = None
    """Tokens that a windowed layer sees, the query's own among them."""
    windowed_layers: tuple[NonNegative, ...] = ()
    """Layers with that window, from 0."""
    window_rope_theta: Above0 | None = None
    """rope_theta of those layers, which are never stretched; null: as the others."""
    query_scale: Above0 | None = None
    """Scores are divided by its square root; null: the width of a head."""
    attention_softcap: Above0 | None = None
    """Scores are bent into minus this to this; null: they are not."""
    logit_softcap: Above0 | None = None
    """The same of the logits."""
    vocab_size: Positive | None = None
    """Rows of the embedding table; null: as many as the tokenizer needs."""
    max_positions: Positive | None = None
    """Longest text that it was made for, in tokens; null: not known."""

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def post_norms(self) -> bool:
        """Whether what a part adds to the stream is normalised."""
        return self.family in GEMMA

    @property
    def scale_embeddings(self) -> bool:
        """Whether embeddings are multiplied by sqrt(width)."""
        return self.family in GEMMA

    @property
    def norm_offset(self) -> float:
        """What norms add to their weight to scale by."""
        return 1.0 if self.family in GEMMA else 0.0

    @property
    def activation(self) -> Literal["silu", "gelu"]:
        """Of the gate; gelu is the one by tanh."""
        return "gelu" if self.family in GEMMA else "silu"


GEMMA = ("gemma2", "gemma3_text")
"""Families of Gemma's kind."""


class LoraConfig(_Section, frozen=True):
    """Low-rank adapters, which are trained in place of the model (Hu et al. 2021)."""

    rank: NonNegative = 0
    """Their rank; 0: none, the whole model is trained."""
    alpha: Above0 = 16.0
    """What they add is multiplied by alpha / rank."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of their inputs that is left out at random, in training."""
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The products that have one."""


class OptimizerConfig(_Section, frozen=True):
    """The update rule and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for hidden matrices with AdamW for embeddings and norms."""
    learning_rate: Above0 = 1e-3
    """Peak learning rate."""
    adam_learning_rate: Above0 = 1e-3
    """Muon only: peak learning rate of the parameters that AdamW updates."""
    warmup_steps: NonNegative = 10
    """Steps of linear warm-up from 0."""
    final_fraction: Fraction = 0.1
    """The cosine ends at this fraction of the peak."""
    b1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    """AdamW's first-moment decay."""
    b2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    """AdamW's second-moment decay."""
    weight_decay: AtLeast0 = 0.01
    """Decoupled weight decay, on matrices only."""
    clip_norm: Above0 = 1.0
    """Gradients are scaled down to this global norm."""


class TrainingConfig(_Section, frozen=True):
    """The loop."""

    steps: Positive = 200
    """Optimizer updates."""
    batch_size: Positive = 8
    """Rows in one update."""
    microbatch_size: Positive | None = None
    """Rows in one forward and backward pass, a divisor of batch_size; null: on a CPU as many as
    hold at most 512 tokens, 256 beside adapters, elsewhere all of them. What was chosen is in the
    run's config.json."""
    eval_every_steps: NonNegative = 100
    """Held-out loss every so many steps, and after the last; 0: never."""
    save_every_steps: NonNegative = 100
    """A checkpoint every so many steps, and after the last; 0: only after the last."""
    save_every_minutes: Above0 | None = None
    """A checkpoint also when so many minutes have passed since the last; null: by steps alone."""
    deterministic: bool = False
    """On a GPU: ask XLA for deterministic kernels. A CPU is deterministic as it is."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters and the optimizer's state; beside adapters, which are float32, of the
    model's parameters."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products. Losses, and sums of gradients, are float32 always."""
    remat: Literal["none", "dots", "block"] = "none"
    """What the backward pass computes again to save memory: nothing, all of a block but its
    products with parameters, or all of it."""
    scan_layers: bool | None = None
    """Compute the blocks in a loop, of which one is compiled: on a CPU slower by a tenth, but
    without it XLA undoes `remat` there. null: with `remat`, and of more than 16 blocks off a CPU.
    What was chosen is in the run's config.json."""
    loss_chunk: NonNegative | None = None
    """Tokens whose logits are held at a time, 0: of all; null: so many as take 256 MB. What was
    chosen is in the run's config.json."""
    fused: bool | None = None
    """Compute with products that stand side by side, made anew for each update; null: on a CPU,
    where an update has at least 2048 tokens on a device. What was chosen is in the run's
    config.json."""
    fast_math: bool = False
    """On a CPU: let XLA change the order of sums and leave out NaN and signed zeros. Other bits."""


class MeshConfig(_Section, frozen=True):
    """The devices of one run. On a CPU they are virtual: parts of the same cores."""

    data: Positive = 1
    """Groups of devices; each has the parameters and takes a part of the batch."""
    fsdp: Positive = 1
    """Devices in a group; parameters, gradients and optimizer state are spread over them."""

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp


class EvaluationConfig(_Section, frozen=True):
    """Scoring generated answers."""

    split: str = "test"
    """The held-out split."""
    limit: Positive | None = None
    """Score only the first so many examples; null: all."""
    batch_size: Positive = 64
    """Prompts generated at a time."""
    max_new_tokens: Positive | None = None
    """Longest completion; null: the longest trained on plus a quarter, as the model keeps it."""
    samples: NonNegative = 100
    """Held-out examples that training answers at its end, for its table and exact match."""


class CheckpointsConfig(_Section, frozen=True):
    """What to keep in order to resume."""

    keep_last: Positive = 3
    """The newest so many stay; older ones go once the next is safe."""
    keep_best: NonNegative = 0
    """So many stay besides, the best by `metric`."""
    metric: str = "eval/loss"
    """What is best; of a checkpoint that was evaluated at its step."""
    mode: Literal["min", "max"] = "min"
    """Whether less of it is better, or more."""
    keep_every_steps: NonNegative = 0
    """Multiples of so many steps stay for good; 0: none."""
    upload: bool = True
    """Copy each checkpoint to the run's artifacts, in the background."""


class TrackingConfig(_Section, frozen=True):
    """Where runs are recorded."""

    experiment: str | None = None
    """MLflow experiment; null: MLFLOW_EXPERIMENT_NAME, else tunix-mlflow."""
    run_name: str | None = None
    """Name of the run; null: dataset and configuration."""
    key: str | None = None
    """A name of your choice by which `resume=auto` finds the run again, on any machine."""
    lease_seconds: Annotated[int, Meta(ge=2, le=3600)] = 60
    """How long a run stays this process's after its last sign of life."""
    offline: bool = False
    """Record in a private store below the state root, and touch no server."""
    system_metrics: bool = True
    """Sample CPU, memory and GPU use into the run."""


class PromotionConfig(_Section, frozen=True):
    """The gate to the alias `champion`."""

    model: str | None = None
    """Registered model name; null: the dataset's name."""
    thresholds: dict[Annotated[str, Meta(pattern="^[a-z0-9_]{1,100}$")], float] = msgspec.field(
        default_factory=lambda: {"exact_match": 0.5}
    )
    """Metric -> the least value that passes, on the evaluated dataset; replaces the default."""


class BenchmarkConfig(_Section, frozen=True):
    """The bench entry point."""

    suite: Literal["train", "data", "peers", "tracking", "checkpoint", "startup", "scale"] = "train"
    """What is measured: the training step, the catalog, other trainers beside ours, what recording
    and saving cost a step, the time to the first step, or what several devices would need."""
    delay_ms: NonNegative = 0
    """tracking: how much later the tracking server is to answer."""
    traces: Positive = 1_000_000
    """data: generated traces."""
    peer_traces: Positive = 100_000
    """data: traces for the seed system's logic, which is scaled by their number."""
    vocabulary: Annotated[int, Meta(ge=16)] = 512
    """Tokens that made-up documents are made of, where no dataset is given."""
    data: Literal["all", "full", "mix"] = "all"
    """Made-up documents: as long as a row, of mixed lengths, or (peers) both; all is full
    elsewhere."""
    cpu_fast: bool = True
    """peers: ours with the preset cpu-fast besides."""
    peers_python: str | None = None
    """peers: interpreter of their environment; null: that of `make peers`."""
    profile: bool = False
    """train: keep a trace of jax.profiler among the run's artifacts."""
    warmup_steps: Positive = 3
    """Steps that are not counted, at the beginning; peers: of every turn."""
    steps: Positive = 20
    """Steps in one repeat."""
    repeats: Positive = 3
    """Repeats, for the median and the spread."""


class Config(_Section, frozen=True):
    """One run's whole configuration."""

    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """Seeds the parameters and the order of batches."""
    dataset: str | None = None
    """Key of a manifest, name-version."""
    device: str = "auto"
    """auto, cpu, gpu or tpu, with an optional index: gpu:1."""
    data: DataConfig = DataConfig()
    limits: LimitsConfig = LimitsConfig()
    base: str | None = None
    """A pretrained model to begin with: a folder as Hugging Face lays it out, a GGUF file, or
    models:/ or runs:/ of such a folder. The shape and the tokenizer are its own. null: from
    scratch."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()
    promotion: PromotionConfig = PromotionConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    @property
    def microbatches(self) -> int:
        """Forward and backward passes of a device in one update."""
        rows = self.training.batch_size // self.mesh.size
        return rows // (self.training.microbatch_size or rows)
