"""The configuration's schema: strict, frozen sections; a docstring under each key has its unit.

A new key with a default needs nothing else: no digest changes. A changed default changes what an
existing digest means, so it needs a new SCHEMA_VERSION; tests/golden/ has each version's defaults.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA_VERSION = 1
"""Part of every configuration digest and of config.json. Raise it when a default changes, or when a
key gets another meaning."""

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Above0 = Annotated[float, Meta(gt=0.0)]
AtLeast0 = Annotated[float, Meta(ge=0.0)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


TODAY = datetime.date(2024, 7, 26)
"""The default of `data.today`: the day on which Llama 3's templates fall back."""


class DataConfig(_Section, frozen=True):
    """How examples become rows of tokens."""

    include_steps: bool = True
    """Train on the reasoning steps before the answer; false: on the answer alone."""
    turns: Literal["all", "last", "expand"] = "all"
    """The turns of the assistant that are trained on: all; the last of each example; or each, as
    an example of its own that ends with it, for templates that cut what earlier turns said."""
    reasoning: Literal["template", "inline"] = "template"
    """What becomes of a thought in a field that the chat template does not read: that is up to
    it; or it goes where the template reads thoughts, else into the content, in <think> tags."""
    end: Literal["template", "append"] = "template"
    """What ends a turn that is trained on: what the chat template writes; or the tokenizer's end
    token too, where the template writes none."""
    today: datetime.date = TODAY
    """The day that a chat template is told if it asks for it (strftime_now), in training and, of
    the trained model, in answers; as YYYY-MM-DD."""
    fidelity: Literal["refuse", "record"] = "refuse"
    """When a text is missing from a turn that is trained on, or nothing ends the turn: refuse to
    train, or record it on the run."""
    sequence_length: Annotated[int, Meta(ge=16, le=131_072)] | None = None
    """Tokens in a row; null: the smallest multiple of 128 that holds the longest example."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What to do with an example that is longer than a row; counts are reported."""
    packing: bool = True
    """Put several examples into one row, kept apart by segment ids."""
    train_split: str = "train"
    """The split that is trained on."""
    validation_split: str = "validation"
    """The split by which training evaluates and chooses the best checkpoint."""
    leakage: Literal["refuse", "record"] = "refuse"
    """When an evaluation prompt is in the training split: refuse to train, or record it on the
    run."""
    evaluation_sets: tuple[str, ...] = ()
    """Keys of datasets to look for in the training split, by prompts and by 8-grams; see
    `tunix-mlflow datasets check-leakage`."""


RENDERING = ("include_steps", "turns", "reasoning", "end", "today")
"""Keys of `data` that decide how an example is rendered: a model keeps those of its training."""


class LimitsConfig(_Section, frozen=True):
    """The largest example that ingest accepts; one beyond a limit is a bad row."""

    prompt_characters: Positive = 50_000
    """Characters of a prompt, and of a message that is not the assistant's."""
    answer_characters: Positive = 50_000
    """Characters of an answer, completion or text."""
    steps: Positive = 1_000
    """Number of reasoning steps."""
    step_characters: Positive = 20_000
    """Characters of a reasoning step."""
    type_characters: Positive = 64
    """Characters of a step's type."""
    body_bytes: Positive = 1_000_000
    """Bytes of a line, or of a row as JSON."""


class RopeScaling(_Section, frozen=True):
    """Rotary position scaling for a longer context."""

    kind: Literal["linear", "llama3"]
    """Scale all frequencies, or as Llama 3.1 does: low ones by `factor`, high ones not, and those
    between in part."""
    factor: Above0
    """Context length divided by the original one."""
    low_freq_factor: Above0 = 1.0
    """llama3: fewer turns than this in the original context is a low frequency."""
    high_freq_factor: Above0 = 4.0
    """llama3: more turns than this in the original context is a high frequency."""
    original_positions: Positive = 8192
    """llama3: tokens of the original context."""


class ModelConfig(_Section, frozen=True):
    """The decoder's shape."""

    family: Literal["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"] = "llama"
    """The architecture: llama; with biases on queries, keys and values (qwen2); with query and key
    norms (qwen3); with a gated GELU, post-norms, norms that scale by 1 + weight, and embeddings
    multiplied by sqrt(width) (gemma2); the same with query and key norms (gemma3_text)."""
    layers: Positive = 2
    """Number of blocks."""
    width: Positive = 128
    """Width of the residual stream."""
    heads: Positive = 4
    """Query heads; a multiple of kv_heads."""
    kv_heads: Positive = 2
    """Key/value heads (grouped-query attention)."""
    head_dim: Positive | None = None
    """Width of one head, even; null: width / heads."""
    mlp_width: Positive = 352
    """Hidden width of the gated feed-forward."""
    rope_theta: Above0 = 10_000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = None
    """Rotary position scaling; null: none."""
    tie_embeddings: bool = True
    """Use the embedding table as the output projection."""
    norm_epsilon: Above0 = 1e-6
    """Added to the mean square in RMSNorm."""
    window: Positive | None = None
    """Tokens that a sliding-window layer attends to, including the query's own."""
    windowed_layers: tuple[NonNegative, ...] = ()
    """Indices of the sliding-window layers, from 0."""
    window_rope_theta: Above0 | None = None
    """rope_theta of the sliding-window layers, which use no rope_scaling; null: rope_theta."""
    query_scale: Above0 | None = None
    """Attention scores are divided by its square root; null: the width of a head."""
    attention_softcap: Above0 | None = None
    """Attention scores are soft-capped to this magnitude; null: no cap."""
    logit_softcap: Above0 | None = None
    """Logits are soft-capped to this magnitude; null: no cap."""
    vocab_size: Positive | None = None
    """Rows of the embedding table; null: as many as the tokenizer needs."""
    max_positions: Positive | None = None
    """Longest sequence the model was trained for, in tokens; null: not known."""

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
        """Whether the output of attention and of the feed-forward is normalised."""
        return self.family in GEMMA

    @property
    def scale_embeddings(self) -> bool:
        """Whether embeddings are multiplied by sqrt(width)."""
        return self.family in GEMMA

    @property
    def norm_offset(self) -> float:
        """Number added to a norm's weight before scaling."""
        return 1.0 if self.family in GEMMA else 0.0

    @property
    def activation(self) -> Literal["silu", "gelu"]:
        """Activation of the gate; gelu is the tanh approximation."""
        return "gelu" if self.family in GEMMA else "silu"


GEMMA = ("gemma2", "gemma3_text")
"""The Gemma families."""


class LoraConfig(_Section, frozen=True):
    """Low-rank adapters (LoRA), which are trained in place of the model (Hu et al. 2021)."""

    rank: NonNegative = 0
    """Rank of the adapters; 0: full fine-tuning."""
    alpha: Above0 = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Dropout rate of the adapters' inputs, in training."""
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """The linear layers that have an adapter."""


class OptimizerConfig(_Section, frozen=True):
    """The update rule and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for hidden matrices with AdamW for embeddings and norms."""
    learning_rate: Above0 = 1e-3
    """Peak learning rate."""
    adam_learning_rate: Above0 = 1e-3
    """Muon only: peak learning rate of the parameters that AdamW updates."""
    warmup_steps: NonNegative = 10
    """Steps of linear warm-up, which begins at 1/n of the peak; at most half of all steps."""
    final_fraction: Fraction = 0.1
    """The cosine ends at this fraction of the peak."""
    schedule_steps: Positive | None = None
    """Steps in which the schedule ends; later ones have its last learning rate. null:
    training.steps."""
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
    hold at most 512 tokens (256 with LoRA), elsewhere all. The value that was chosen is in the
    run's config.json."""
    eval_every_steps: NonNegative = 100
    """Steps between evaluations on the validation split; also after the last step. 0: never."""
    save_every_steps: NonNegative = 100
    """Steps between checkpoints; also after the last step. 0: only after the last."""
    save_every_minutes: Above0 | None = None
    """Minutes after which a checkpoint is saved as well; null: by steps only."""
    deterministic: bool = False
    """On a GPU: use XLA's deterministic kernels. A CPU is always deterministic."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and the optimizer state; with LoRA, of the frozen model: adapters are
    float32."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matmuls. Losses, and sums of gradients, are always float32."""
    remat: Literal["none", "dots", "block"] = "none"
    """Rematerialization: what the backward pass recomputes to save memory; nothing, all of a block
    except its matmuls with parameters, or the whole block."""
    scan_layers: bool | None = None
    """Scan over the blocks and compile one of them. A tenth slower on a CPU, where XLA would
    otherwise undo `remat`. null: with `remat`, and for more than 16 blocks on an accelerator. The
    value that was chosen is in the run's config.json."""
    loss_chunk: NonNegative | None = None
    """Tokens whose logits are held at a time; 0: all; null: as many as take 256 MB. The value that
    was chosen is in the run's config.json."""
    fused: bool | None = None
    """Concatenate weights that multiply the same input into one matmul, once per update; null: on a
    CPU, if an update has at least 2048 tokens on a device. The value that was chosen is in the
    run's config.json."""
    fast_math: bool = False
    """On a CPU: let XLA reorder sums and ignore NaN and signed zeros. Results differ in the last
    bits."""


class MeshConfig(_Section, frozen=True):
    """The device mesh of one run. On a CPU the devices are virtual and share the cores."""

    data: Positive = 1
    """Data-parallel groups; each holds the parameters and takes a part of the batch."""
    fsdp: Positive = 1
    """Devices in a group; parameters, gradients and optimizer state are sharded over them."""

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp


class EvaluationConfig(_Section, frozen=True):
    """Scoring generated answers."""

    split: str = "test"
    """The split that `evaluate` and the gate read. Training never reads it."""
    limit: Positive | None = None
    """Number of examples to score, the first ones; null: all."""
    batch_size: Positive = 64
    """Prompts in one generated batch."""
    max_new_tokens: Positive | None = None
    """Longest completion; null: the model's own limit, a quarter above the longest trained on."""
    samples: NonNegative = 100
    """Validation examples that training answers at its end, for its table and exact match."""


class CheckpointsConfig(_Section, frozen=True):
    """Which checkpoints to keep."""

    keep_last: Positive = 3
    """Number of newest checkpoints to keep; older ones are deleted once the next is safe."""
    keep_best: NonNegative = 0
    """Number of best checkpoints to keep besides, by `metric`."""
    metric: str = "validation/loss"
    """Metric of `keep_best`; a checkpoint counts if it was evaluated at its step."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger `metric` is better."""
    keep_every_steps: NonNegative = 0
    """Keep checkpoints at multiples of this many steps; 0: none."""
    upload: bool = True
    """Upload each checkpoint to the run's artifacts, in the background."""


class TrackingConfig(_Section, frozen=True):
    """Where runs are recorded."""

    experiment: str | None = None
    """MLflow experiment; null: MLFLOW_EXPERIMENT_NAME, else tunix-mlflow."""
    run_name: str | None = None
    """Name of the run; null: made from the dataset and the stage."""
    key: str | None = None
    """A name of your choice by which `--resume auto` finds the run again, on any machine."""
    lease_seconds: Annotated[int, Meta(ge=2, le=3600)] = 60
    """Seconds without a renewal after which another process may take over a run."""
    offline: bool = False
    """Record in a private store below the state root, and contact no server."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use."""
    incomplete: Literal["fail", "allow"] = "fail"
    """What a command does whose run MLflow has only in part, since it refuses the rest: fail exits
    with 4, at the end."""


class PromotionConfig(_Section, frozen=True):
    """The gate to the alias `champion`."""

    model: str | None = None
    """Name of the registered model; null: the dataset's name without its version."""
    thresholds: dict[Annotated[str, Meta(pattern="^[a-z0-9_]{1,100}$")], float] = msgspec.field(
        default_factory=lambda: {"exact_match": 0.5}
    )
    """Metric -> the smallest value that passes, on the evaluated dataset; of loss the largest.
    Replaces the default."""


class BenchmarkConfig(_Section, frozen=True):
    """What `bench` measures."""

    suite: Literal["train", "data", "peers", "tracking", "checkpoint", "startup", "scale"] = "train"
    """What is measured: the training step, the catalog, other trainers beside ours, the cost of
    recording and of saving, the time to the first step, or the needs of several devices."""
    delay_ms: NonNegative = 0
    """tracking: latency added to the tracking server, in milliseconds."""
    traces: Positive = 1_000_000
    """data: number of generated traces."""
    peer_traces: Positive = 100_000
    """data: number of traces for the seed system's logic, whose figures are scaled up."""
    vocabulary: Annotated[int, Meta(ge=16)] = 512
    """Distinct tokens of synthetic documents, which are used when no dataset is given."""
    data: Literal["all", "full", "mix"] = "all"
    """Synthetic documents: of a row's length, of mixed lengths, or (peers) both; in other suites
    all means full."""
    cpu_fast: bool = True
    """peers: also measure ours with the preset cpu-fast."""
    peers_python: str | None = None
    """peers: interpreter of their environment; null: the one that `make peers` builds."""
    profile: bool = False
    """train: log a trace of jax.profiler as artifacts."""
    warmup_steps: Positive = 3
    """Steps at the beginning that are not counted; peers: at the beginning of each repeat."""
    steps: Positive = 20
    """Steps in one repeat."""
    repeats: Positive = 3
    """Repeats, for the median and the spread."""


class Config(_Section, frozen=True):
    """One run's whole configuration."""

    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """Seed of the initial parameters and of the order of batches."""
    dataset: str | None = None
    """Key of a dataset, NAME-vN, or its digest."""
    device: str = "auto"
    """auto, cpu, gpu or tpu, with an optional index: gpu:1."""
    data: DataConfig = DataConfig()
    limits: LimitsConfig = LimitsConfig()
    base: str | None = None
    """A pretrained model to fine-tune: a folder in Hugging Face's layout, a GGUF file, or a runs:/
    or models:/ URI of such a folder. It determines the shape and the tokenizer. null: train from
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
        """Forward and backward passes of one device in one update."""
        rows = self.training.batch_size // self.mesh.size
        return rows // (self.training.microbatch_size or rows)
