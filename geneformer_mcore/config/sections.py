"""Every setting of a run. Defaults are the model card's recipe for the 10M model where it has one.
OmegaConf 2.3 takes neither `Literal` nor frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional


class Activation(Enum):
    """Nonlinearity of the feed-forward blocks and of the prediction head."""

    relu = "relu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"


class Norm(Enum):
    """Position of a layer's norms."""

    pre = "pre"
    post = "post"


class Source(Enum):
    """Content of `data.store`: tokenised cells, or counts, tokenised as they are read."""

    tokens = "tokens"
    counts = "counts"


class Loader(Enum):
    """Producer of batches; both produce the same."""

    thread = "thread"
    dali = "dali"


class Attention(Enum):
    """Implementation of softmax(QK)V."""

    auto = "auto"
    te = "te"
    flash = "flash"
    sdpa = "sdpa"
    blockwise = "blockwise"
    plain = "plain"


class Precision(Enum):
    """Number format of weights and activations; the optimizer always works in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"


class Recompute(Enum):
    """Activations that are recomputed in the backward pass to save memory."""

    none = "none"
    selective = "selective"
    full = "full"


class Pooling(Enum):
    """From a cell's tokens to one vector."""

    mean = "mean"
    cls = "cls"


class NonFinite(Enum):
    """Action when a loss or a gradient is NaN or infinite."""

    stop = "stop"
    skip = "skip"


@dataclass
class RunConfig:
    """The run directory."""

    dir: str = "runs/pretrain"
    """Folder of checkpoints, metrics and logs. If it holds a checkpoint, the run continues."""


@dataclass
class DataConfig:
    """Cells and their form."""

    store: str = "build/demo/store"
    """Token store of data_prep/build_store.py. With source=counts: an h5ad file, a SOMA Experiment
    (folder or URI), a folder of h5ad files, or several of these with commas between."""
    source: Source = Source.tokens
    """tokens: a token store, faster. counts: raw counts, tokenised while training; needs
    `vocabulary`. Cells and masks are the same in another order, in spans of at least 4096 cells."""
    vocabulary: str = ""
    """Vocabulary file for source=counts; a token store brings its own."""
    split: str = ""
    """split.json (data_prep/make_split.py) for source=counts; empty: 5 % validation and 5 % test
    at random, as build_store.py does."""
    cache_dir: str = ""
    """Folder on the node's own disk for a flat copy of the token store, about 3 GB per million
    cells, written by the first run that names it: reading is several times faster. Copying must
    take less than `parallel.timeout_s` seconds. Empty: none."""
    loader: Loader = Loader.thread
    """thread: batches by the prefetch thread. dali: by NVIDIA DALI, on the GPU; slow on a CPU."""
    seq_length: int = 2048
    """Tokens per cell at most, [CLS] included. Below the store's length cells are truncated."""
    mask_probability: float = 0.15
    """Probability of a gene being selected for prediction, independently per gene."""
    mask_fractions: list[float] = field(default_factory=lambda: [0.80, 0.02, 0.18])
    """Of the selected: shares shown as [MASK], as a random gene, unchanged. Sum 1. The card's
    mixture; BERT's is 0.8, 0.1, 0.1."""
    span_cells: int = 1024
    """Neighbouring cells of the store that are read together. Part of the order of cells."""
    window_spans: int = 32
    """Spans shuffled into each other. Memory per rank: about twice this many spans of 2 bytes x
    seq_length x span_cells, more if a global batch spans more windows than two; data-parallel
    ranks share a window's spans, unless cells are packed."""
    prefetch_steps: int = 4
    """Global batches prepared ahead by the prefetch thread; 0 prepares them in line."""
    packing: bool = False
    """Lay cells end to end instead of padding each to the longest: the same losses without work on
    padding, balanced over ranks. Ranks then read the cells of a step from anywhere: with many of
    them set `cache_dir`. With source=counts every rank tokenises all cells of a step."""
    tokens_per_micro_batch: int = 0
    """Most tokens of a packed micro batch; 0 takes train.micro_batch_size x seq_length, the memory
    of a padded one."""
    pad_multiple: int = 64
    """Micro batches of a step are padded to the longest cell, packed ones to the fullest, rounded
    up to this many tokens. 0 pads always to seq_length, packed ones to tokens_per_micro_batch."""


@dataclass
class ModelConfig:
    """The encoder. Vocabulary and sequence length come from the data."""

    num_layers: int = 6
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream, and of a cell's embedding."""
    ffn_hidden_size: int = 512
    """Width inside the feed-forward blocks."""
    num_attention_heads: int = 4
    """Attention heads; divides hidden_size, and is a multiple of parallel.tensor."""
    hidden_dropout: float = 0.02
    """Dropout on the embeddings and on what each block adds to the residual stream."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    activation: Activation = Activation.relu
    """Nonlinearity of the feed-forward blocks."""
    head_activation: Optional[Activation] = None
    """Nonlinearity of the prediction head; null takes `activation`."""
    norm: Norm = Norm.pre
    """pre: norms of each block's input and of the last layer's output, as in the card. post: norms
    of the sum after each block and of the embeddings, as in BERT and Hugging Face's Geneformer."""
    fp32_residual: bool = True
    """Keep the residual stream in 32 bits under bf16, as the card does."""
    attention: Attention = Attention.auto
    """te: Transformer Engine. flash: the FlashAttention-2 inside torch, for GPUs and 16 bits.
    sdpa: torch's scaled dot product attention. blockwise: ours, for CPUs, with a fast dropout.
    plain: Megatron's, every score in memory. auto: on a GPU te, or flash without it or with
    train.deterministic, or sdpa in fp32; on a CPU sdpa, or blockwise with attention dropout."""

    compile: Optional[bool] = None
    """Compile the elementwise parts of a layer and the loss with torch.compile. Takes up to a
    minute at the start, and draws other dropout. null: on a GPU with Triton and a C compiler; on a
    CPU it gains nothing. Set it for runs that must be bitwise the same on several machines."""


@dataclass
class ParallelConfig:
    """Layout of model and work over ranks. No value changes what is computed."""

    tensor: int = 1
    """Ranks that share every matrix."""
    pipeline: int = 1
    """Ranks that share the layers."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule); 1 is the plain 1F1B schedule."""
    sequence: bool = False
    """Split activations between the shared matrices along the sequence; needs tensor > 1."""
    recompute: Recompute = Recompute.none
    """selective: attention; full: whole layers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks during the backward pass, in four parts."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass, in parts. Needs overlap_grad_reduce."""
    timeout_s: int = 600
    """Seconds in which every rank must make progress (a step, a batch of validation, the next
    cells), else the job ends with exit code 1, naming the rank that hangs. Saving has a limit
    of its own, checkpoint.deadline_s."""


@dataclass
class OptimConfig:
    """AdamW with warm-up, cosine decay and a constant tail."""

    lr: float = 1e-3
    """Peak learning rate. The card's value, for global batches of 512 and more."""
    min_lr: float = 2e-5
    """Learning rate at the end of the cosine and during the tail."""
    warmup_fraction: float = 0.01
    """Share of the steps in which the learning rate rises linearly from 0 to lr."""
    hold_fraction: float = 0.05
    """Share of the steps, at the end, with min_lr."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and norms have none."""
    beta1: float = 0.9
    """Decay of the first moment, per step."""
    beta2: float = 0.999
    """Decay of the second moment, per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down. 0 never clips."""


@dataclass
class TrainConfig:
    """Length, batch sizes, seed."""

    steps: int = 115430
    """Optimizer steps of the whole run, restarts included."""
    micro_batch_size: int = 32
    """Cells per forward pass and rank. With data.packing only a measure of its tokens."""
    global_batch_size: int = 2048
    """Cells per optimizer step, over all ranks; without data.packing a multiple of
    micro_batch_size x data parallel."""
    seed: int = 1234
    """Fixes weights, order of cells, masks and dropout."""
    precision: Precision = Precision.bf16
    """bf16: for GPUs since Ampere, and CPUs that have it. fp32: for the others. fp16: for Volta and
    Turing, with a loss scale; updates whose gradients overflow are skipped. fp8: bf16 with matrix
    products of Transformer Engine in 8 bits, since Hopper."""
    max_minutes: float = 0.0
    """Minutes of training after which this start saves and exits with status 75. 0 is none."""
    validate_every_steps: int = 1000
    """Steps between validations; the last step always validates. 0 never validates."""
    validate_batches: int = 20
    """Global batches per validation, the same ones each time."""
    deterministic: bool = False
    """Allow deterministic kernels only. On a GPU that costs speed; a CPU is bitwise anyway."""
    non_finite: NonFinite = NonFinite.stop
    """stop: end the run with exit code 1. skip: skip the update, and log it in skipped.jsonl."""
    spike_sigma: float = 0.0
    """Skip an update whose loss or gradient norm is more than so many standard deviations above
    the mean of the last `spike_window` updates. 0 skips none."""
    spike_window: int = 128
    """Updates that define a spike; there is none before so many were made."""
    max_skips: int = 10
    """Updates that may be skipped in a row; one more ends the run with exit code 1."""
    profile_steps: int = 0
    """Steps of each start, after its first three, of which rank 0 writes a trace into profile/ of
    the run directory. They are slow. 0 writes none."""


@dataclass
class MetricsConfig:
    """Reports."""

    log_every_steps: int = 10
    """Steps between lines in metrics.jsonl, TensorBoard and on the console."""


@dataclass
class CheckpointConfig:
    """Frequency and retention of checkpoints."""

    save_every_steps: int = 1000
    """Steps between checkpoints; 0 saves only at the last step and when interrupted."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this. 0 keeps none of them."""
    keep_best: bool = True
    """Also keep the one with the lowest validation loss, among steps that validated."""
    asynchronous: bool = False
    """Continue training while a copy, 12 to 18 bytes per parameter over all ranks, is written."""
    deadline_s: int = 600
    """Seconds in which a checkpoint must be written, else the run ends with exit code 1. Give
    torchrun as much as --shutdown-timeout."""


@dataclass
class FinetuneConfig:
    """Fine-tuning by launch/finetune.py."""

    checkpoint: str = ""
    """Folder of the pretraining run, or one of its step folders; a resumed run refuses another."""
    label: str = ""
    """Column of the token store's obs with the classes. Cells without a value are skipped."""
    pooling: Pooling = Pooling.mean
    """Input of the classifier: the mean over the genes of a cell, or its [CLS]."""
    dropout: float = 0.1
    """Dropout on the input of the classifier."""
    frozen_layers: int = 0
    """Freeze the embedding and so many layers; all: train the classifier only; 0: everything."""
    lora_rank: int = 0
    """Instead of the encoder's own weights, train a correction of this rank to each matrix of its
    attention (LoRA), with a few percent of the moments' memory. 0 is none."""
    lora_alpha: float = 16.0
    """The correction is multiplied by lora_alpha / lora_rank."""
    lora_feed_forward: bool = False
    """Correct the matrices of the feed-forward blocks, too."""


@dataclass
class Config:
    """All sections, for YAML files and `section.key=value` arguments."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
