"""Megatron's data-parallel wrapper and distributed AdamW around the stages of a rank.

    stages -> DistributedDataParallel (gradient buffers) -> DistributedOptimizer (sharded AdamW)
    learning rate: linear warm-up -> cosine -> min_lr

The distributed optimizer is used on one rank too: one code path, one checkpoint format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as matrices_only_decay
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer

from geneformer_mcore.config.sections import OptimConfig, ParallelConfig
from geneformer_mcore.model.geneformer import Geneformer


def learning_rate(
    step: int, steps: int, warmup_steps: int, hold_steps: int, optim: OptimConfig
) -> float:
    """Learning rate of update number `step` (0 is the first) of `steps`.
    Linear from lr / warmup_steps to lr, then a cosine to min_lr, then min_lr for `hold_steps`."""
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    decay_steps = steps - warmup_steps - hold_steps
    if step >= warmup_steps + decay_steps:
        return optim.min_lr
    progress = (step - warmup_steps) / decay_steps
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


_OVERLAPPED_BUCKETS = 4
"""Buckets of a stage's gradients, sent during the backward pass. By Megatron's default, 40 million
weights, a model of 10 million would have a single one, sent at the end."""

_FIRST_LOSS_SCALE = 2.0**10
"""Of fp16 losses at first; halved when gradients overflow, doubled after 1,000 updates without.
Losses are sums, so their gradients are as large as those of single genes."""


@dataclass(frozen=True)
class Trainable:
    """The stages of this rank, wrapped, and the optimizer that updates them."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer

    @property
    def stages(self) -> list[Geneformer]:
        return [chunk.module for chunk in self.chunks]

    def complete_weights(self) -> None:
        """Gather updated weights; all ranks together, before other reads than a forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def wrap(stages: list[Geneformer], optim: OptimConfig, parallel: ParallelConfig) -> Trainable:
    """Call after the initial weights are in place: the optimizer copies them to fp32."""
    config = stages[0].config
    num_weights = sum(weights.numel() for stage in stages for weights in stage.parameters())
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=-(-num_weights // _OVERLAPPED_BUCKETS),  # without overlap one bucket
    )
    chunks = [
        DistributedDataParallel(config, ddp, stage, disable_bucketing=number > 0)
        for number, stage in enumerate(stages)
    ]
    _count_padding(chunks)
    _overlap(chunks, parallel)
    settings = _optimizer_config(optim, config.params_dtype)
    optimizer = get_megatron_optimizer(
        settings,
        chunks,
        config_overrides=matrices_only_decay(settings),
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # Megatron's own scheduler would apply this.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    give_states(optimizer)
    return Trainable(chunks, optimizer)


def _overlap(chunks: list[DistributedDataParallel], parallel: ParallelConfig) -> None:
    """Configure Megatron's schedules to send gradients, and the head to wait for its weights."""
    config = chunks[0].config
    if parallel.overlap_grad_reduce:
        # Only the last micro batch of a step may start the sum over data-parallel ranks.
        config.no_sync_func = _per_chunk([chunk.no_sync for chunk in chunks])
        # Stages behind the first have idle time at the end of a step: they start it there.
        config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        for chunk in chunks:
            if chunk.module.post_process:
                chunk.module.lm_head.register_forward_pre_hook(_output_weights_ready(chunk))


def _per_chunk(functions: list[Callable]) -> Callable | list[Callable]:
    # As a schedule takes them.
    return functions[0] if len(functions) == 1 else functions


def _output_weights_ready(chunk: DistributedDataParallel) -> Callable[..., None]:
    """Megatron waits for a module's weights when the module is called. The output layer never is:
    `Geneformer.logits` uses its weights, which on the last stage would be the last step's."""

    def hook(*_arguments: object) -> None:
        for weights in chunk.module.output_layer.parameters():
            chunk.param_to_bucket_group[weights].finish_param_sync()

    return hook


def _count_padding(chunks: list[DistributedDataParallel]) -> None:
    """Make the buckets of the gradient buffers count their padding as their own.

    Megatron-Core gathers the optimizer's state without the padding between buckets and cuts
    it at offsets with it: with two buckets, as the tied embedding's under pipeline parallelism, a
    checkpoint would hold moments and fp32 weights from wrong positions.
    """
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
            buffer.numel_unpadded = buffer.numel


def _optimizer_config(optim: OptimConfig, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=_FIRST_LOSS_SCALE,
        use_distributed_optimizer=True,
    )


def give_states(optimizer: MegatronOptimizer) -> None:
    """Create moments and steps before the first update, so that they can be saved or loaded."""
    for adam in _torch_adams(optimizer):
        for parameter in _parameters(adam):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_states(optimizer: MegatronOptimizer, state: dict) -> None:
    """Load what `optimizer.sharded_state_dict(...)` described and dist_checkpointing filled.

    Megatron-Core with torch's AdamW gives all parameters the same `step` tensor, which then
    counts once per parameter, and fails over it when it copies the moments: so `step` is taken out
    while the moments are copied, and each parameter gets one of its own.
    """
    moments = state.pop("param_state")
    assert state.pop("param_state_sharding_type") == "fully_reshardable"
    optimizer.load_state_dict(state)
    steps = [
        (adam.state[parameter], float(adam.state[parameter].pop("step")))
        for adam in _torch_adams(optimizer)
        for parameter in _parameters(adam)
    ]
    (inner,) = optimizer.chained_optimizers
    inner.load_parameter_state_from_fully_reshardable(moments)
    for entry, step in steps:
        entry["step"] = torch.tensor(step)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the gradients, on every rank. Call once, before `update`."""
    overflow = optimizer.prepare_grads()
    return math.inf if overflow else float(optimizer.get_grad_norm())


def update(trainable: Trainable, norm: float) -> None:
    """Clip by the global norm and take one AdamW step on every rank."""
    optimizer = trainable.optimizer
    (inner,) = optimizer.chained_optimizers
    if inner.config.clip_grad > 0:
        clip_grad_by_total_norm_fp32(inner.get_parameters(), inner.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    # Transformer Engine's and apex's Adam keep their step per group.
    inner = [chained.optimizer for chained in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.AdamW)]


def _parameters(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]
