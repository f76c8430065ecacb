"""The folder of a small trained run, and cells to use it on, for tests of what comes after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config import load
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS
from tests.distributed import toy
from tests.distributed.parity import enlarge
from tests.distributed.ranks import in_turn, run_ranks
from tests.support.reference import Reference
from tests.support.small_cells import (
    adata_of,
    gene_ids,
    plain_tokens,
    random_counts,
    vocabulary_of,
)  # fmt: skip

NUM_GENES, NUM_UNKNOWN, NUM_CELLS = toy.VOCABULARY - NUM_SPECIALS, 30, 41
ONE_GENE, UNKNOWN, EMPTY, LONG = 3, 5, 11, 17
"""Cells with one known gene; with unknown genes only; with none; with more genes than fit."""
STEP = 2


def words(*more: object) -> list[str]:
    """Of a command line: texts are split at spaces, and paths are not."""
    return [
        word for each in more for word in (each.split() if isinstance(each, str) else [f"{each}"])
    ]


@dataclass(frozen=True, eq=False)
class Trained:
    """run: its folder, vocabulary.json in it;  weights: of the one-rank model;  h5ad: cells."""

    run: Path
    weights: dict[str, np.ndarray]
    h5ad: Path

    def line(self, *more: object, h5ad: Path | None = None) -> list[str]:
        """A command line that begins with this model and its cells, or others. more: words, or
        several with spaces between."""
        return words("--checkpoint", self.run, "--input", h5ad or self.h5ad, *more)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.run / "vocabulary.json")

    @property
    def step_folder(self) -> Path:
        return checkpoints.step_folder(self.run / "checkpoints", STEP)

    @cached_property
    def reference(self) -> Reference:
        weights = {name: torch.from_numpy(array) for name, array in self.weights.items()}
        return Reference(weights, num_heads=4, vocabulary_size=toy.VOCABULARY)

    @cached_property
    def counts(self) -> np.ndarray:
        """float64 [cells, columns]; read-only."""
        counts = anndata.read_h5ad(self.h5ad).X.toarray().astype(np.float64)
        counts.setflags(write=False)
        return counts

    @cached_property
    def tokens(self) -> list[np.ndarray]:
        """The tokens of every cell, [CLS] first, as plainly as they can be made."""
        return [self.sentence(row) if row.sum() else np.zeros(1, np.int64) for row in self.counts]

    def sentence(self, counts: np.ndarray) -> np.ndarray:
        known = np.arange(NUM_GENES) + NUM_SPECIALS
        columns = np.concatenate([known, np.zeros(NUM_UNKNOWN, np.int64)])
        return plain_tokens(counts, columns, self.vocabulary, toy.SEQ_LENGTH)

    def states(self, tokens: np.ndarray, num_layers: int | None = None) -> np.ndarray:
        """float64 [tokens, H] of a cell by the plain reference; or behind so many layers."""
        return _states(self.reference, tuple(tokens.tolist()), num_layers)


@cache
def _states(model: Reference, tokens: tuple[int, ...], num_layers: int | None) -> np.ndarray:
    cell = torch.tensor([tokens]), torch.tensor([len(tokens)])
    with torch.no_grad():
        found = model.hidden(*cell) if num_layers is None else model.states(*cell, num_layers)
    return found[0].numpy()


KINDS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "bf16": ("train.precision=bf16",),
    "post": ("model.norm=post",),
    "hides nothing": ("data.mask_probability=1e-6",),
}
"""Name of a trained run -> settings."""


def make_all(folder: Path) -> dict[str, Trained]:
    """Trains one of every kind, by one rank, and makes the cells."""
    runs = {kind: folder / kind.replace(" ", "_") for kind in KINDS}
    for run in runs.values():
        run.mkdir()
    h5ad = folder / "cells.h5ad"
    made_up_cells().write_h5ad(h5ad)
    (weights,) = run_ranks(in_turn, 1, *((_train, (runs[kind], *KINDS[kind])) for kind in KINDS))
    return {kind: Trained(runs[kind], of_run, h5ad)
            for kind, of_run in zip(KINDS, weights, strict=True)}  # fmt: skip


def made_up_cells() -> anndata.AnnData:
    """Cells of all kinds, over known genes and, in the last columns, unknown ones."""
    rng = np.random.default_rng(9)
    counts = random_counts(rng, NUM_CELLS, NUM_GENES + NUM_UNKNOWN, density=0.07).toarray()
    counts[[ONE_GENE, UNKNOWN, EMPTY]] = 0
    counts[ONE_GENE, [7, NUM_GENES + 2]] = 4, 9
    counts[UNKNOWN, NUM_GENES:] = 2
    counts[LONG, : NUM_GENES // 2] = rng.integers(1, 90, NUM_GENES // 2)
    return adata_of(
        sparse.csr_matrix(counts),
        [*gene_ids(NUM_GENES), *gene_ids(90_000 + number for number in range(NUM_UNKNOWN))],
        obs={"cell_type": pd.Categorical(["a", "b"] * 20 + ["a"])},
        cell_ids=[f"cell{number}" for number in range(NUM_CELLS)],
        uns={"kept": "as it was"},
        obsm={"X_other": np.ones((NUM_CELLS, 2), np.float32)},
    )


def commit(
    made: toy.Toy,
    run: Path,
    config: str,
    vocabulary: Vocabulary,
    step: int,
    val_loss: float | None = None,
) -> None:
    """The vocabulary and the checkpoint of a lone rank's run, in its folder."""
    vocabulary.save(run / "vocabulary.json")
    root = run / "checkpoints"
    staging = checkpoints.make_staging(root, step)
    state.save(made.trainable, staging, 0)
    identity = Identity(config, {}, vocabulary.checksum, "c0ffee")
    record = Record(step, 16 * step, {}, identity, {"tensor": 1}, {"torch": "2"}, {}, val_loss)
    record.save(staging)
    checkpoints.commit(staging, root, step)


def _train(run: Path, *overrides: str) -> dict[str, np.ndarray]:
    settings = (f"data.store={run / 'moved'}", *overrides)
    toy_run = toy.make(*settings)
    enlarge(toy_run)
    # Afterwards: in bf16 the optimizer's weights are then no more what rounding made of them.
    toy_run.steps(STEP)
    commit(toy_run, run, load(None, [*toy.SETTINGS, *settings])[1], vocabulary_of(NUM_GENES), STEP)
    (stage,) = toy_run.trainable.stages
    return {
        name: tensor.detach().float().numpy()
        for name, tensor in stage.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
