"""Global batches of real lengths, dealt to simulated ranks: how unlike is their work?

    lengths -> global batches, without repeats within an epoch
      -> packed:  feed.packing.pack, longest first                    -> work of every rank
      -> dealt:   cell i to rank i % ranks, packed as it comes        -> work of every rank
    max / mean of tokens, of squares, of FLOPs, over all steps

All wait for the slowest rank in every step, so the factor of a whole run is the sum of the largest
over the sum of the means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.scaling_model.hardware import SEQ_LENGTH, Model
from geneformer_mcore.config.sections import DataConfig
from geneformer_mcore.data.collate import padded_length, pieces
from geneformer_mcore.data.packing import pack
from geneformer_mcore.model.flops import ModelShape, Workload, train_flops

PAD_MULTIPLE = DataConfig().pad_multiple
MASKED = DataConfig().mask_probability


@dataclass(frozen=True)
class Costs:
    """Training FLOPs per token, per squared length and per predicted position: FLOPs are linear in
    the three."""

    token: int
    square: int
    predicted: int

    @classmethod
    def of(cls, shape: ModelShape) -> Costs:
        """Those of a model."""
        return cls(*(train_flops(shape, Workload(*one)) for one in np.eye(3, dtype=int).tolist()))

    def of_cells(self, lengths_N: np.ndarray) -> np.ndarray:
        """float64 [N], FLOPs of each cell; all but [CLS] may be predicted."""
        lengths = lengths_N.astype(np.float64)
        predicted = MASKED * (lengths - 1)
        return self.token * lengths + self.square * lengths**2 + self.predicted * predicted


@dataclass(frozen=True)
class Loads:
    """Of one step, float64 [ranks] each. tokens and squares are those of cells; flops is what a
    rank executes, the end of its rows included; useful what its cells need."""

    tokens: np.ndarray
    squares: np.ndarray
    flops: np.ndarray
    useful: np.ndarray
    micro_batches: int


@dataclass(frozen=True)
class Deal:
    """Many steps of one way to deal.

    tokens, squares, flops:  max / mean of each step, float64 [steps]
    factor:                  largest executed FLOPs, summed, over the mean of useful ones, summed
    micro_batches:           of a rank, the most of any step
    """

    tokens: np.ndarray
    squares: np.ndarray
    flops: np.ndarray
    factor: float
    micro_batches: int

    def as_json(self) -> dict[str, float | int]:
        """Mean and largest of each."""
        spread = {
            f"{name}_{kind}": float(getattr(getattr(self, name), kind)())
            for name in ("tokens", "squares", "flops")
            for kind in ("mean", "max")
        }
        return {**spread, "factor": self.factor, "micro_batches": self.micro_batches}


def batches(lengths: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """int64 [size], `steps` times: epoch after epoch in a new order, straddling their borders."""
    rng = np.random.default_rng(seed)
    stream = np.empty(0, np.int64)
    for _ in range(steps):
        while len(stream) < size:
            stream = np.concatenate([stream, rng.permutation(lengths)])
        yield stream[:size]
        stream = stream[size:]


def packed(lengths_N: np.ndarray, ranks: int, budget: int, costs: Costs) -> Loads:
    """As pretraining deals them: micro batches of one shape on all ranks."""
    packing = pack(lengths_N, budget, ranks)
    positions = padded_length(packing.most_tokens, PAD_MULTIPLE, budget)
    shares = [[lengths_N[cells] for cells in packing.of_rank(rank, ranks)] for rank in range(ranks)]
    flops = [sum(_executed(one, positions, costs) for one in share) for share in shares]
    return _loads([np.concatenate(share) for share in shares], flops, costs, len(shares[0]))


def dealt(lengths_N: np.ndarray, ranks: int, budget: int, costs: Costs) -> Loads:
    """Cell i to rank i % ranks, packed end to end as they come, micro batches of the same number of
    cells, each rank's rows as long as they must be."""
    cells_per_pass = max(1, budget // SEQ_LENGTH)
    shares = [lengths_N[rank::ranks] for rank in range(ranks)]
    flops = []
    for share in shares:
        passes = [share[i : i + cells_per_pass] for i in range(0, len(share), cells_per_pass)]
        rows = [padded_length(int(one.sum()), PAD_MULTIPLE, budget) for one in passes]
        flops.append(sum(_executed(one, row, costs) for one, row in zip(passes, rows, strict=True)))
    return _loads(shares, flops, costs, -(-len(shares[0]) // cells_per_pass))


def simulate(steps: list[np.ndarray], ranks: int, budget: int, model: Model) -> tuple[Deal, Deal]:
    """(packed, dealt) over the same global batches."""
    costs = Costs.of(model.shape)
    return (
        _deal([packed(lengths_N, ranks, budget, costs) for lengths_N in steps]),
        _deal([dealt(lengths_N, ranks, budget, costs) for lengths_N in steps]),
    )


def _executed(lengths_N: np.ndarray, positions: int, costs: Costs) -> float:
    """FLOPs of a packed micro batch: linear layers go over the end of the row too, and attention
    over the pieces it is cut into."""
    bounds, _ = pieces(lengths_N, positions)
    squares = float((np.diff(bounds.astype(np.float64)) ** 2).sum())
    predicted = MASKED * float(lengths_N.sum() - len(lengths_N))
    return costs.token * positions + costs.square * squares + costs.predicted * predicted


def _loads(shares: list[np.ndarray], flops: list[float], costs: Costs, micro_batches: int) -> Loads:
    def of_ranks(values: list[float]) -> np.ndarray:
        return np.array(values, np.float64)

    return Loads(
        of_ranks([float(share.sum()) for share in shares]),
        of_ranks([float((share**2).sum()) for share in shares]),
        of_ranks(flops),
        of_ranks([float(costs.of_cells(share).sum()) for share in shares]),
        micro_batches,
    )


def _deal(steps: list[Loads]) -> Deal:
    def largest_over_mean(name: str) -> np.ndarray:
        values = [getattr(loads, name) for loads in steps]
        return np.array([load.max() / load.mean() for load in values])

    slowest = sum(float(loads.flops.max()) for loads in steps)
    useful = sum(float(loads.useful.mean()) for loads in steps)
    return Deal(
        largest_over_mean("tokens"),
        largest_over_mean("squares"),
        largest_over_mean("flops"),
        slowest / useful,
        max(loads.micro_batches for loads in steps),
    )
