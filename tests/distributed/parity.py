"""How far a layout is from plain PyTorch: logits, every gradient, the gradient norm.

    one rank -> weights -> Reference (fp64) -> logits, gradients of the global batch = the truth
    each rank -> same weights, Megatron's schedule -> its slices, as training has them -> errors

Nothing here trusts another run of our own: what is compared with is tests/support/reference.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from geneformer_mcore.data.collate import cells_of
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.step import Totals, run_schedule
from geneformer_mcore.types import PAD, Batch
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks
from tests.support.reference import Reference

SPREAD = 8.0
"""Initial weights are so small that most mistakes would hide below 1e-5: make them larger."""

GRAD_OVERLAP = "parallel.overlap_grad_reduce=true"
OVERLAP = (GRAD_OVERLAP, "parallel.overlap_param_gather=true")
TP2, PP2 = "parallel.tensor=2", "parallel.pipeline=2"
INTERLEAVED = (PP2, "parallel.virtual_pipeline=2")
SEQUENCE = (TP2, "parallel.sequence=true")
PACKED = "data.packing=true"

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp1 pp1 dp1": (1, ()),
    "tp2 pp1 dp1": (2, (TP2,)),
    "tp1 pp2 dp1": (2, (PP2,)),
    "tp2 pp2 dp1": (4, (TP2, PP2)),
    "tp1 pp1 dp2": (2, ()),
    "tp1 pp2 dp2": (4, (PP2,)),
    "tp2 pp1 dp2": (4, (TP2,)),
    "pp2 interleaved": (2, INTERLEAVED),
    "tp2 sequence": (2, SEQUENCE),
    "tp2 pp2 sequence": (4, (*SEQUENCE, PP2)),
    "pp4": (4, ("parallel.pipeline=4",)),
    "tp4": (4, ("parallel.tensor=4",)),
    "dp4": (4, ()),
    "dp2 grad overlap": (2, (GRAD_OVERLAP,)),
    "dp2 overlap": (2, OVERLAP),
    "pp2 dp2 overlap": (4, (PP2, *OVERLAP)),
    "pp2 interleaved dp2 overlap": (4, (*INTERLEAVED, *OVERLAP)),
    "packed": (1, (PACKED,)),
    "tp2 sequence packed": (2, (*SEQUENCE, PACKED)),
    "tp1 pp2 dp2 packed": (4, (PP2, PACKED)),
    "tp2 pp2 sequence packed": (4, (*SEQUENCE, PP2, PACKED)),
    "pp2 interleaved packed": (2, (*INTERLEAVED, PACKED)),
    "dp4 packed": (4, (PACKED,)),
    "dp2 overlap packed": (2, (*OVERLAP, PACKED)),
}
"""Name -> (ranks, settings)."""

Change = Callable[[list[Batch], int], list[Batch]]
"""What is done to the micro batches of the data-parallel rank whose number is given."""


@dataclass(frozen=True)
class Truth:
    """Plain PyTorch's answer in fp64.

    weights:    global key -> the whole parameter, fp32
    gradients:  global key -> of (sum of losses) / (genes predicted) over the global batch
    functions:  names of the activations of layers and head
    counts:     as in Totals: predicted genes, cells with one, tokens, squared lengths
    """

    weights: dict[str, np.ndarray]
    functions: tuple[str, str]
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    loss: float = 0.0
    counts: tuple[int, ...] = ()

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(np.square(each).sum()) for each in self.gradients.values()))

    def reference(self) -> Reference:
        weights = {name: torch.from_numpy(weight) for name, weight in self.weights.items()}
        return Reference(weights, 4, toy.VOCABULARY, *(getattr(F, name) for name in self.functions))


Slices = dict[tuple[str, tuple[int, ...]], tuple[int, float]]
"""(key, offset in the whole) of a rank's parts of gradients -> (size, squared error)."""


class Seen(NamedTuple):
    """What one rank found. logits: largest difference; None on ranks that have no logits."""

    totals: Totals
    logits: float | None
    slices: Slices
    norm: float


@dataclass(frozen=True)
class Parity:
    """The errors of a layout. logits: absolute; the others relative; gradients: by global key."""

    logits: float
    gradients: dict[str, float]
    norm: float
    loss: float


def unchanged(batches: list[Batch], _data_rank: int) -> list[Batch]:
    return batches


def truth(change: Change = unchanged, data_size: int = 1, settings: Sequence[str] = ()) -> Truth:
    """Runs the plain model on the global batch, as `data_size` ranks would change it."""
    (found,) = run_ranks(_truth, 1, change, data_size, *settings)
    return found


def parity(
    name: str, expected: Truth, change: Change = unchanged, settings: Sequence[str] = ()
) -> Parity:
    (found,) = parities(name, [(expected, change)], settings)
    return found


def parities(
    name: str, cases: Sequence[tuple[Truth, Change]], settings: Sequence[str] = ()
) -> list[Parity]:
    """The same of several changed steps, on ranks that are started once."""
    ranks, layout = LAYOUTS[name]
    calls = [(_seen, (*case, *layout, *settings)) for case in cases]
    by_rank = run_ranks(in_turn, ranks, *calls)
    return [
        _errors(seen, expected)
        for seen, (expected, _) in zip(zip(*by_rank, strict=True), cases, strict=True)
    ]


def _errors(seen: Sequence[Seen], expected: Truth) -> Parity:
    logits = [each.logits for each in seen if each.logits is not None]
    assert logits, "no rank had logits"
    # A sum that every tensor rank takes part in leaves the mean loss as it is, and doubles these.
    assert {counts_of(each.totals) for each in seen} == {expected.counts}
    return Parity(
        logits=_worst(logits),
        gradients=_gradient_errors(seen, expected),
        norm=_worst([_relative(each.norm, expected.norm) for each in seen]),
        loss=_worst([_relative(each.totals.loss, expected.loss) for each in seen]),
    )


def counts_of(totals: Totals) -> tuple[int, ...]:
    return totals.num_predicted, totals.num_cells, totals.num_tokens, totals.sum_squared_lengths


def _worst(errors: list[float]) -> float:
    """The largest; NaN if any is, which Python's max would lose."""
    return float(np.max(errors, initial=0.0))


def _relative(value: float, expected: float) -> float:
    if math.isnan(expected):  # a loss where nothing is predicted
        return 0.0 if math.isnan(value) else math.inf
    return abs(value - expected) / abs(expected) if expected else abs(value)


def _gradient_errors(seen: Sequence[Seen], expected: Truth) -> dict[str, float]:
    """Relative error of each whole gradient; of slices that several ranks hold, the worst counts.
    Fails if any part of any gradient is on no rank."""
    worst: Slices = {}
    for where, (numel, error) in (part for each in seen for part in each.slices.items()):
        # Written so that NaN counts as the worst.
        if where not in worst or not error <= worst[where][1]:
            worst[where] = numel, error
    errors = {}
    for key, gradient in expected.gradients.items():
        sizes, squares = zip(
            *(part for where, part in worst.items() if where[0] == key), strict=True
        )
        assert sum(sizes) == gradient.size, f"{key} is not whole"
        error, norm = math.sqrt(sum(squares)), float(np.linalg.norm(gradient))
        errors[key] = error / norm if norm else error
    assert {key for key, _ in worst} == set(errors)
    return errors


def _truth(change: Change, data_size: int, *settings: str) -> Truth:
    run = toy.make("train.micro_batch_size=2", *settings)
    enlarge(run)
    (stage,) = run.trainable.stages
    weights = {name: weight.detach().numpy() for name, weight in stage.named_parameters()}
    model = run.config.model
    head = model.head_activation or model.activation
    answer = Truth(weights, (model.activation.value, head.value))
    reference = answer.reference()
    losses, counts = [], torch.zeros(4, dtype=torch.int64)
    for data_rank in range(data_size):
        place = replace(run.topology, data_rank=data_rank, data_size=data_size)
        for batch in change(toy.feed(run.config, place).step(0), data_rank):
            loss = reference.loss_sum(
                batch.tokens_BS, batch.lengths_N, batch.selected_M, batch.labels_M
            )
            losses.append(loss)
            cells, lengths_N = batch.selected_M // batch.tokens_BS.shape[1], batch.lengths_N.long()
            sums = len(cells), len(cells.unique()), lengths_N.sum(), lengths_N.square().sum()
            counts += torch.tensor(sums)
    loss, predicted = torch.stack(losses).sum(), int(counts[0])
    (loss / max(predicted, 1)).backward()
    gradients = {name: weight.grad.numpy() for name, weight in reference.w.items()}
    mean = loss.item() / predicted if predicted else math.nan
    return replace(answer, gradients=gradients, loss=mean, counts=tuple(counts.tolist()))


def enlarge(run: toy.Toy, drawn: float = 0.0) -> None:
    """Larger weights, the same ones in every layout, for parameters and optimizer. drawn: the
    deviation of matrices that are drawn again, so that none stays 0."""
    with torch.no_grad():
        for entry in (e for stage in run.trainable.stages for e in sharded_parameters(stage)):
            seed = int.from_bytes(hashlib.sha256(entry.key.encode()).digest()[:7], "little")
            draw = torch.Generator().manual_seed(seed)
            normal = slice_of(entry, torch.randn(entry.global_shape, generator=draw))
            if len(entry.global_shape) == 1:
                entry.data.add_(normal * 0.1)
            elif drawn:
                entry.data.copy_(normal * drawn)
            else:
                entry.data.mul_(SPREAD)
    run.trainable.optimizer.reload_model_params()


def _seen(expected: Truth, change: Change, *settings: str) -> Seen:
    run = toy.make("train.micro_batch_size=2", *settings)
    enlarge(run)
    batches = change(run.feed.step(0), run.topology.data_rank)
    last, logits = run.trainable.stages[-1], None
    recorded = _record_logits(last) if last.post_process else []
    totals = _run_twice(run, batches)
    norm = optim.gradient_norm(run.trainable.optimizer)
    if last.post_process:
        first = run.topology.tensor_rank * last.output_layer.output_size_per_partition
        logits = _logits_error(recorded[-len(batches) :], batches, expected.reference(), first)
    return Seen(totals, logits, _slices(run.trainable, expected), norm)


def _run_twice(run: toy.Toy, batches: list[Batch]) -> Totals:
    """Forward and backward of the second of two equal steps: in the first Megatron only learns
    which gradients a bucket waits for, and sends them all at the end."""
    chunks = run.trainable.chunks
    for number in range(2):
        run.trainable.optimizer.zero_grad()
        for chunk in chunks:
            chunk.zero_grad_buffer()
            if number and chunk.ddp_config.overlap_param_gather:
                _forget_others_weights(chunk)
        totals = run_schedule(chunks, batches, run.topology, forward_only=False)
    return totals


def _forget_others_weights(chunk: torch.nn.Module) -> None:
    """As after an update: each data-parallel rank knows its share of the weights only. Whoever
    computes with the rest before it has been collected computes NaN."""
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            shares = bucket.param_data.chunk(buffer.data_parallel_group.size())
            for rank, share in enumerate(shares):
                if rank != buffer.data_parallel_group.rank():
                    share.fill_(math.nan)


def _record_logits(stage: Geneformer) -> list[torch.Tensor]:
    recorded: list[torch.Tensor] = []
    theirs = stage.logits

    def logits(*arguments: torch.Tensor) -> torch.Tensor:
        answer = theirs(*arguments)
        recorded.append(answer.detach().clone())  # the loss is computed in place
        return answer

    stage.logits = logits
    return recorded


def _logits_error(
    recorded: list[torch.Tensor], batches: list[Batch], reference: Reference, first: int
) -> float:
    """Largest difference; `first`: the id of the first column that this tensor rank holds. Columns
    that pad the vocabulary have no probability."""
    errors = []
    for logits_MV, batch in zip(recorded, batches, strict=True):
        last = min(first + logits_MV.shape[1], toy.VOCABULARY)
        assert not logits_MV[:, max(last - first, 0) :].exp().any()
        if len(batch.selected_M) == 0 or last <= first:
            continue
        tokens_BS, selected_M = in_rows(batch)
        whole = reference.logits(tokens_BS, batch.lengths_N).flatten(0, 1).detach()
        assert whole.std() > 0.5, "weights too small for the comparison to mean anything"
        wanted = whole[selected_M][:, first:last]
        errors.append(float((logits_MV[:, : last - first] - wanted).abs().max()))
    return _worst(errors)


def in_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, selected places) with a row per cell, packed or not: what the plain model takes."""
    if batch.bounds is None:
        return batch.tokens_BS, batch.selected_M
    starts_N = batch.bounds.long()[: len(batch.lengths_N)]
    rows = [
        batch.tokens_BS[0, start : start + length]
        for start, length in zip(starts_N.tolist(), batch.lengths_N.tolist(), strict=True)
    ]
    tokens_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    cell_M = cells_of(batch, batch.selected_M)
    return tokens_BS, cell_M * tokens_BS.shape[1] + batch.selected_M - starts_N[cell_M]


def _slices(trainable: optim.Trainable, expected: Truth) -> Slices:
    found = {}
    for chunk in trainable.chunks:
        _gather_gradients(chunk)
        gradients = {each.data_ptr(): each.main_grad for each in chunk.module.parameters()}
        for entry in sharded_parameters(chunk.module):
            gradient = gradients[entry.data.data_ptr()]
            wanted = slice_of(entry, torch.from_numpy(expected.gradients[entry.key]))
            error = float((gradient.double() - wanted).square().sum())
            found[entry.key, tuple(entry.global_offset)] = wanted.numel(), error
    return found


def _gather_gradients(chunk: torch.nn.Module) -> None:
    """Completes main_grad: after the sum over data-parallel ranks each has only its share of every
    bucket, which is all that its part of the optimizer reads."""
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shares = bucket.grad_data.chunk(group.size())
            mine = shares[group.rank()].clone()
            dist.all_gather(list(shares), mine, group=group)
