"""The plan of a Config on a number of ranks, or every reason why it cannot run; a pure function,
called before there is a process group, so that an impossible layout does not hang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from geneformer_mcore.config.sections import Config, Precision, Recompute, Source
from geneformer_mcore.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Numbers from settings and world size, which is tensor x pipeline x data_parallel.

    micro_batches:           per step and data-parallel rank; 0 if packed
    tokens_per_micro_batch:  most tokens of a packed micro batch; 0 if padded
    hold_steps:              at min_lr at the end
    """

    world_size: int
    data_parallel: int
    micro_batches: int
    tokens_per_micro_batch: int
    warmup_steps: int
    hold_steps: int


def plan(config: Config, world_size: int, trains: bool = True) -> Plan:
    """The plan of `config` on `world_size` ranks. Raises ConfigError listing every problem.

    trains: false for the use of a model: one that was converted names no store
    """
    problems = [*_ranges(config), *_model(config), *_layout(config, world_size), *_finetune(config)]
    if trains and not config.data.store.strip():
        problems.append("data.store must name a folder, and is empty.")
    if problems:
        raise ConfigError("\n".join(problems))
    data_parallel = world_size // (config.parallel.tensor * config.parallel.pipeline)
    train, optim, packed = config.train, config.optim, config.data.packing
    return Plan(
        world_size=world_size,
        data_parallel=data_parallel,
        micro_batches=0
        if packed
        else train.global_batch_size // (train.micro_batch_size * data_parallel),
        tokens_per_micro_batch=token_budget(config) if packed else 0,
        warmup_steps=round(optim.warmup_fraction * train.steps),
        hold_steps=round(optim.hold_fraction * train.steps),
    )


def token_budget(config: Config) -> int:
    """Most tokens of a packed micro batch."""
    padded = config.train.micro_batch_size * config.data.seq_length
    return config.data.tokens_per_micro_batch or padded


def _ranges(config: Config) -> Iterator[str]:
    for name, low, high in _RANGES:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if not low <= value <= high:  # or NaN
            bound = f"at least {low}" if high == _MANY else f"within {low}..{high}"
            yield f"{name} must be {bound}, and is {value}."
    fractions = config.data.mask_fractions
    shares = len(fractions) == 3 and all(0 <= share <= 1 for share in fractions)
    if not shares or not abs(sum(fractions) - 1) <= 1e-9:  # or NaN
        yield (
            "data.mask_fractions are three shares that sum to 1 ([MASK], random gene, unchanged), "
            f"and are {list(fractions)}."
        )
    if not config.run.dir.strip():
        yield "run.dir must name a folder, and is empty."
    yield from _source(config)
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr ({optim.min_lr}) must not exceed optim.lr ({optim.lr})."
    if optim.warmup_fraction + optim.hold_fraction > 1:
        yield (
            f"optim.warmup_fraction ({optim.warmup_fraction}) + optim.hold_fraction "
            f"({optim.hold_fraction}) must not exceed 1."
        )


def _source(config: Config) -> Iterator[str]:
    data = config.data
    if data.source is Source.counts:
        if not data.vocabulary:
            yield (
                "data.source=counts needs data.vocabulary, and that is empty: name a vocabulary "
                "file (data_prep/build_vocabulary.py makes one)."
            )
        if data.cache_dir:
            yield (
                f"data.cache_dir ({data.cache_dir}) is for copies of token stores, and data.source "
                "is counts: leave it empty, or build a store."
            )
        return
    for name, value in (("vocabulary", data.vocabulary), ("split", data.split)):
        if value:
            yield (
                f"data.{name} ({value}) is for data.source=counts, and that is tokens: a token "
                "store brings its own, so leave it empty."
            )


def _model(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    heads, hidden, ffn = model.num_attention_heads, model.hidden_size, model.ffn_hidden_size
    if heads > 0 and hidden % heads:
        yield _multiple("model.hidden_size", hidden, "model.num_attention_heads", heads)
    if tensor > 0:
        if heads % tensor:
            yield _multiple("model.num_attention_heads", heads, "parallel.tensor", tensor)
        if ffn % tensor:
            yield _multiple("model.ffn_hidden_size", ffn, "parallel.tensor", tensor)
    if not model.fp32_residual and config.train.precision is Precision.fp32:
        yield (
            "model.fp32_residual=false has no meaning with train.precision=fp32: "
            "leave it true, or train in bf16."
        )


def _layout(config: Config, world_size: int) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    tensor, pipeline, chunks = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    if min(tensor, pipeline, chunks, train.micro_batch_size, train.global_batch_size) < 1:
        return  # reported by _ranges
    yield from _layers(config)
    yield from _packing(config)
    yield from _fp8(config)
    if parallel.sequence and tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor > 1, and that is 1."
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true."
    if parallel.sequence and config.data.seq_length % tensor:
        length = config.data.seq_length
        yield _multiple("data.seq_length", length, "parallel.tensor", tensor) + (
            " Sequence parallel gives each rank an equal share of the positions."
        )
    if world_size % (tensor * pipeline):
        yield (
            f"the number of ranks ({world_size}) must be a multiple of parallel.tensor x "
            f"parallel.pipeline ({tensor} x {pipeline} = {tensor * pipeline}): start "
            f"{tensor * pipeline} ranks with torchrun --nproc_per_node, or lower one of the two."
        )
        return
    if config.data.packing:
        return
    data_parallel = world_size // (tensor * pipeline)
    per_pass = train.micro_batch_size * data_parallel
    if train.global_batch_size % per_pass:
        yield (
            f"train.global_batch_size ({train.global_batch_size}) must be a multiple of "
            f"train.micro_batch_size x data parallel ({train.micro_batch_size} x {data_parallel} "
            f"= {per_pass}; data parallel = {world_size} ranks / (tensor {tensor} x pipeline "
            f"{pipeline}))."
        )
        return
    micro_batches = train.global_batch_size // per_pass
    if chunks > 1 and micro_batches % pipeline:
        yield (
            f"the interleaved pipeline needs micro batches per step ({micro_batches} = "
            f"{train.global_batch_size} / {per_pass}) in multiples of parallel.pipeline "
            f"({pipeline})."
        )


def _packing(config: Config) -> Iterator[str]:
    data, tensor = config.data, config.parallel.tensor
    budget = data.tokens_per_micro_batch
    if not data.packing:
        if budget:
            yield (
                f"data.tokens_per_micro_batch ({budget}) is for data.packing=true, and that is "
                "false: leave it 0, and set train.micro_batch_size."
            )
        return
    if 0 < budget < data.seq_length:
        yield (
            f"data.tokens_per_micro_batch ({budget}) must be at least data.seq_length "
            f"({data.seq_length}), or the longest cells fit nowhere; 0 takes "
            "train.micro_batch_size x data.seq_length."
        )
    if config.parallel.sequence and budget % tensor:
        yield _multiple("data.tokens_per_micro_batch", budget, "parallel.tensor", tensor) + (
            " Sequence parallel gives each rank an equal share of the positions."
        )


def _fp8(config: Config) -> Iterator[str]:
    """Transformer Engine's 8-bit products need multiples of 16."""
    if config.train.precision is not Precision.fp8:
        return
    data, model, tensor = config.data, config.model, config.parallel.tensor
    sizes = {
        "model.hidden_size": model.hidden_size,
        f"model.ffn_hidden_size / parallel.tensor ({tensor})": model.ffn_hidden_size // tensor,
        "data.pad_multiple": data.pad_multiple,
        "data.seq_length": data.seq_length,
        "data.tokens_per_micro_batch": data.tokens_per_micro_batch,
    }
    for name, size in sizes.items():
        if size % 16:
            yield _multiple(name, size, "the blocks of train.precision=fp8", 16)


def _layers(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline * parallel.virtual_pipeline
    if layers % stages:
        yield (
            f"model.num_layers ({layers}) must be a multiple of parallel.pipeline x "
            f"parallel.virtual_pipeline ({parallel.pipeline} x {parallel.virtual_pipeline} = "
            f"{stages})."
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline ({parallel.virtual_pipeline}) needs parallel.pipeline > 1, "
            "and that is 1."
        )


def _finetune(config: Config) -> Iterator[str]:
    tune, layers = config.finetune, config.model.num_layers
    if tune.frozen_layers > layers:
        yield (
            f"finetune.frozen_layers must be within 0..{layers}, the layers of this model, and is "
            f"{tune.frozen_layers}."
        )
    if tune.frozen_layers and tune.lora_rank:
        yield (
            f"finetune.lora_rank ({tune.lora_rank}) leaves all of the encoder as it was, so "
            f"finetune.frozen_layers ({tune.frozen_layers}) has no meaning: set one of them to 0."
        )
    if tune.lora_rank > config.model.hidden_size:
        yield (
            f"finetune.lora_rank ({tune.lora_rank}) must be at most model.hidden_size "
            f"({config.model.hidden_size}): a correction of a higher rank is no saving."
        )
    if not tune.checkpoint:  # nothing is fine-tuned, but a model that was may be in use
        return
    if config.data.source is Source.counts:
        yield "fine-tuning reads labels from a token store: leave data.source=tokens."
    if config.parallel.pipeline > 1:
        yield (
            f"fine-tuning works without pipeline parallel, and parallel.pipeline is "
            f"{config.parallel.pipeline}: set it to 1; parallel.tensor shares the model, too."
        )
    if (tune.frozen_layers or tune.lora_rank) and config.parallel.recompute is Recompute.full:
        yield (
            "parallel.recompute=full gives no gradient behind weights that are frozen "
            "(finetune.frozen_layers, finetune.lora_rank): use selective or none."
        )


def _multiple(name: str, value: int, of: str, divisor: int) -> str:
    return f"{name} ({value}) must be a multiple of {of} ({divisor})."


_MANY = 10**12
_RANGES = (
    ("data.seq_length", 2, 65_536),
    ("data.mask_probability", 1e-6, 1),
    ("data.span_cells", 1, 1_000_000),
    ("data.window_spans", 1, 1_000_000),
    ("data.prefetch_steps", 0, 1_000),
    ("data.pad_multiple", 0, 65_536),
    ("data.tokens_per_micro_batch", 0, 16_777_216),
    ("model.num_layers", 1, 256),
    ("model.hidden_size", 1, 65_536),
    ("model.ffn_hidden_size", 1, 1_000_000),
    ("model.num_attention_heads", 1, 1_024),
    ("model.hidden_dropout", 0, 0.99),
    ("model.attention_dropout", 0, 0.99),
    ("parallel.tensor", 1, 1_024),
    ("parallel.pipeline", 1, 1_024),
    ("parallel.virtual_pipeline", 1, 1_024),
    ("parallel.timeout_s", 1, 86_400),
    ("optim.lr", 0, 10),
    ("optim.min_lr", 0, 10),
    ("optim.warmup_fraction", 0, 1),
    ("optim.hold_fraction", 0, 1),
    ("optim.weight_decay", 0, 10),
    ("optim.beta1", 0, 0.999999),
    ("optim.beta2", 0, 0.9999999),
    ("optim.eps", 1e-30, 1),
    ("optim.clip", 0, 1e6),
    ("train.steps", 1, _MANY),
    ("train.micro_batch_size", 1, 1_048_576),
    ("train.global_batch_size", 1, 1_048_576),
    ("train.seed", 0, 2**63 - 1),
    ("train.max_minutes", 0, 10**6),
    ("train.validate_every_steps", 0, _MANY),
    ("train.validate_batches", 1, _MANY),
    ("train.spike_sigma", 0, 1e6),
    ("train.spike_window", 8, 1_000_000),
    ("train.max_skips", 0, _MANY),
    # A trace of some hundred steps is more than its viewers can open.
    ("train.profile_steps", 0, 100),
    ("metrics.log_every_steps", 1, _MANY),
    ("checkpoint.save_every_steps", 0, _MANY),
    ("checkpoint.keep_last", 1, 1_000_000),
    ("checkpoint.keep_every", 0, _MANY),
    ("checkpoint.deadline_s", 1, 86_400),
    ("finetune.dropout", 0, 0.99),
    ("finetune.frozen_layers", 0, 256),
    ("finetune.lora_rank", 0, 65_536),
    ("finetune.lora_alpha", 1e-6, 1e6),
)
"""(setting, smallest, largest) of every number. What a machine can hold is another question, which
training/sizes.py answers once the cells are known."""
