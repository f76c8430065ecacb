"""How far states move when a cell's sentence is changed.

originals -> states of every token, kept          [T, H]
variants  -> states -> beside the originals'      -> per variant: cell, genes, toward a goal
                                                  -> per token: its gene

A shift is 1 - cosine, computed as half the squared distance of the two unit vectors: the difference
of two numbers close to 1 would lose what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from geneformer_mcore.contracts import Batch
from geneformer_mcore.model import inference, states
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.model.states import Pooling

COLUMNS = ("shift", "gene_shift", "goal_shift")
"""What there is per variant: 1 - cosine of the cell's vectors before and after; the mean of the
same over genes that both sentences have; cosine with the goal after, less that before (NaN without
a goal)."""


@dataclass(frozen=True)
class Originals:
    """What variants are compared with, on the device.

    cells_NH:   fp32, the cells' vectors;  tokens_TH: the states of all their tokens, end to end
    goal_H:     fp64, the vector of the goal, or None
    """

    cells_NH: torch.Tensor
    tokens_TH: torch.Tensor
    goal_H: torch.Tensor | None


def originals(
    stages: Sequence[Geneformer], batch: Batch, pooling: Pooling, goal_H: torch.Tensor | None
) -> Originals | None:
    """Of the cells of one packed batch; None on ranks that do not hold the last stage."""

    def kept(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> torch.Tensor:
        return inference.whole(hidden_SBH, stage)

    found = inference.through(stages, [batch], kept)
    if not found:
        return None
    (hidden_SBH,) = found
    used = int(batch.lengths_N.sum())
    return Originals(states.pool(hidden_SBH, batch, pooling), hidden_SBH[:used, 0], goal_H)


@dataclass(frozen=True)
class Variants:
    """A packed batch of variants, and what each of its tokens was before.

    cells_N:   int64, the number of each variant's cell among the originals
    places_T:  int64, the place of the same gene among Originals.tokens_TH, -1 where there is none
               and for [CLS]
    """

    batch: Batch
    cells_N: torch.Tensor
    places_T: torch.Tensor


def of_variants(
    stages: Sequence[Geneformer],
    variants: Sequence[Variants],
    before: Originals | None,
    pooling: Pooling,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per batch (fp64 [N, COLUMNS], fp32 [T] of its tokens, NaN where there is nothing to compare);
    nothing on ranks that do not hold the last stage, whose `before` is None.

    All batches must be of one shape.
    """
    waiting = iter(variants)

    def compared(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> object:
        these = next(waiting)
        assert before is not None
        assert batch is these.batch
        return _compare(inference.whole(hidden_SBH, stage), these, before, pooling)

    batches = [each.batch for each in variants]
    return inference.through(stages, batches, compared)  # type: ignore[arg-type, return-value]


def _compare(
    hidden_SBH: torch.Tensor, these: Variants, before: Originals, pooling: Pooling
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = these.batch
    after_NH = states.pool(hidden_SBH, batch, pooling).double()
    before_NH = before.cells_NH.double()[these.cells_N]
    moved_T = _moved_tokens(hidden_SBH, these, before)
    has_T = ~moved_T.isnan()
    sums_N, counts_N = (
        torch.segment_reduce(values, "sum", lengths=batch.lengths_N)
        for values in (moved_T.nan_to_num().double(), has_T.double())
    )
    goal_N = torch.full_like(sums_N, torch.nan)
    if before.goal_H is not None:
        # cos a - cos b, from unit vectors: their difference first, for it is small.
        after_NH, before_NH = (functional.normalize(each, dim=1) for each in (after_NH, before_NH))
        goal_N = (after_NH - before_NH) @ functional.normalize(before.goal_H, dim=0)
    return torch.stack([_apart(after_NH, before_NH), sums_N / counts_N, goal_N], 1), moved_T


def _moved_tokens(hidden_SBH: torch.Tensor, these: Variants, before: Originals) -> torch.Tensor:
    """fp32 [T], NaN where the sentence before has no such gene."""
    after_TH = hidden_SBH[: len(these.places_T), 0].float()
    before_TH = before.tokens_TH[these.places_T.clamp(min=0)].float()
    return torch.where(these.places_T >= 0, _apart(after_TH, before_TH), torch.nan)


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 - cosine of rows."""
    difference = functional.normalize(one, dim=1) - functional.normalize(other, dim=1)
    return difference.square().sum(dim=1) / 2
