"""Faults of plain Megatron-Core that are worked around here, one test each.

A test that fails with another version of Megatron-Core: the fault is mended there, and what stands
against it (docs/parallel.md names the place) can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.types import Batch
from tests.distributed import toy
from tests.distributed.parity import PP2
from tests.distributed.ranks import in_turn, run_ranks


def save_without_padding(folder: Path) -> None:
    """In fp32, where the optimizer's weights are the model's own."""
    optim._count_padding = lambda chunks: None
    run = toy.make(PP2, "model.num_layers=2")  # its first bucket needs padding
    run.step()
    run.write(str(folder))


def test_state_of_several_buckets_is_cut_at_wrong_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_count_padding`: the two buckets are those of the tied embedding and of all else."""
    folder = tmp_path / "step"
    run_ranks(save_without_padding, 2, folder)
    exact = weights_reader.read_weights(folder)
    monkeypatch.setattr(weights_reader, "_most_exact", lambda name, there: name)
    own = weights_reader.read_weights(folder)
    assert any(not torch.equal(exact[name], own[name]) for name in own)


def steps_after_loading() -> tuple[int, int]:
    run = toy.make()
    run.step()
    (inner,) = run.trainable.optimizer.chained_optimizers
    inner.load_state_dict(inner.state_dict())
    steps = [entry["step"] for entry in inner.optimizer.state.values()]
    return len(steps), len({id(step) for step in steps})


def decay_of_what_takes_none() -> list[float]:
    """Weight decay of the groups of biases and norms, as Megatron's factory gives it."""
    run = toy.make("optim.weight_decay=0.25")
    settings = optim._optimizer_config(run.config.optim, torch.float32)
    made = get_megatron_optimizer(
        settings,
        run.trainable.chunks,
        config_overrides=get_standard_config_overrides(settings),
        use_gloo_process_groups=False,
    )
    return [each["weight_decay"] for each in made.param_groups if each["wd_mult"] == 0]


def sum_and_what_is_reported() -> tuple[float, float]:
    """Of the losses of one micro batch, with their number for the schedule to divide by."""
    run, sums = toy.make(), []
    run.trainable.stages[0].config.calculate_per_token_loss = False

    def step(batches: Iterator[Batch], chunk: Geneformer) -> tuple[torch.Tensor, Callable]:
        def summed(loss_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = loss_M.sum()
            sums.append(total.item())
            return total, torch.tensor(loss_M.numel(), dtype=torch.int), total.detach()

        return chunk(next(batches)), summed

    batch, *_ = run.feed.step(0)
    size, length = batch.tokens_BS.shape
    (reported,) = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=run.trainable.chunks[0],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=size,
        forward_only=True,
    )
    return sums[0], float(reported)


def refusals() -> tuple[str, bool]:
    """Of its norm under sequence parallelism, and of its head of a model with relu."""
    run = toy.make("model.activation=relu")
    core = run.trainable.stages[0].config
    told = ""
    try:
        WrappedTorchNorm(replace(core, tensor_model_parallel_size=2, sequence_parallel=True), 32)
    except AssertionError as error:
        told = f"{error}"
    head = BertLMHead(32, core)
    return told, head.gelu is torch.nn.functional.gelu


def test_faults_that_one_rank_shows() -> None:
    parts = (steps_after_loading, decay_of_what_takes_none, sum_and_what_is_reported, refusals)
    (found,) = run_ranks(in_turn, 1, *((part, ()) for part in parts))
    (parameters, steps), decays, (total, reported), (told, is_gelu) = found
    assert parameters > steps == 1, "`load_states`: all parameters share one step"
    assert set(decays) == {0.25}, "`wrap`: the multiplier of weight decay is only noted"
    assert reported < total / 2, "`step._forward_step`: what is reported was divided in place"
    assert "sequence parallel" in told, "`layers.LayerNorm`: theirs refuses it"
    assert is_gelu, "`masked_gene_loss`: their head has one activation"


def test_the_residual_stream_is_cast() -> None:
    """`layers.bias_dropout_add` keeps it in 32 bits."""
    add = get_bias_dropout_add(training=True, fused=False)
    narrow = torch.ones(4, dtype=torch.bfloat16)
    assert add((narrow, None), torch.ones(4), 0.0).dtype is torch.bfloat16
