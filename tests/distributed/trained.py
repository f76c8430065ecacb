"""The folder of a small trained run, and cells to use it on, for tests of what comes after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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
from geneformer_mcore.distributed import groups
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS
from tests.distributed import toy
from tests.distributed.parity import enlarge
from tests.distributed.ranks import run_ranks
from tests.reference import Reference
from tests.small_cells import gene_id, plain_tokens, random_counts, vocabulary_of

NUM_GENES, NUM_UNKNOWN, NUM_CELLS = toy.VOCABULARY - NUM_SPECIALS, 30, 41
ONE_GENE, UNKNOWN, EMPTY, LONG = 3, 5, 11, 17
"""Cells with one known gene; with unknown genes only; with none; with more genes than fit."""
STEP = 2


@dataclass(frozen=True, eq=False)
class Trained:
    """run: its folder, vocabulary.json in it;  weights: of the one-rank model;  h5ad: cells."""

    run: Path
    weights: dict[str, np.ndarray]
    h5ad: Path

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The one it was trained with."""
        return Vocabulary.load(self.run / "vocabulary.json")

    @property
    def step_folder(self) -> Path:
        """Its one checkpoint."""
        return checkpoints.step_folder(self.run / "checkpoints", STEP)

    @cached_property
    def reference(self) -> Reference:
        """The same model in plain PyTorch and fp64."""
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
        known = np.arange(NUM_GENES) + NUM_SPECIALS
        columns = np.concatenate([known, np.zeros(NUM_UNKNOWN, np.int64)])
        return [
            plain_tokens(row, columns, self.vocabulary, toy.SEQ_LENGTH)
            if row.sum()
            else np.zeros(1, np.int64)
            for row in self.counts
        ]


KINDS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "bf16": ("train.precision=bf16",),
    "post": ("model.norm=post",),
    "hides nothing": ("data.mask_probability=1e-6",),
}
"""Name of a trained run -> settings."""


def make_all(folder: Path) -> dict[str, Trained]:
    """Trains one of every kind, by one rank, and makes the cells."""
    vocabulary = vocabulary_of(NUM_GENES)
    runs = {kind: folder / kind.replace(" ", "_") for kind in KINDS}
    for run in runs.values():
        run.mkdir()
        vocabulary.save(run / "vocabulary.json")
    h5ad = folder / "cells.h5ad"
    made_up_cells().write_h5ad(h5ad)
    (weights,) = run_ranks(_train_all, 1, runs)
    return {kind: Trained(run, weights[kind], h5ad) for kind, run in runs.items()}


def made_up_cells() -> anndata.AnnData:
    """Cells of all kinds, over known genes and, in the last columns, unknown ones."""
    rng = np.random.default_rng(9)
    counts = random_counts(rng, NUM_CELLS, NUM_GENES + NUM_UNKNOWN, density=0.07).toarray()
    counts[[ONE_GENE, UNKNOWN, EMPTY]] = 0
    counts[ONE_GENE, [7, NUM_GENES + 2]] = 4, 9
    counts[UNKNOWN, NUM_GENES:] = 2
    counts[LONG, : NUM_GENES // 2] = rng.integers(1, 90, NUM_GENES // 2)
    genes = [gene_id(number) for number in range(NUM_GENES)]
    genes += [gene_id(90_000 + number) for number in range(NUM_UNKNOWN)]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["a", "b"] * 20 + ["a"])},
        index=[f"cell{number}" for number in range(NUM_CELLS)],
    )
    cells = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    cells.uns["kept"] = "as it was"
    cells.obsm["X_other"] = np.ones((NUM_CELLS, 2), np.float32)
    return cells


def _train_all(runs: Mapping[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    weights = {}
    for kind, run in runs.items():
        weights[kind] = _train(run, *KINDS[kind])
        groups.stop(stay=True)
    return weights


def _train(run: Path, *overrides: str) -> dict[str, np.ndarray]:
    vocabulary = Vocabulary.load(run / "vocabulary.json")
    settings = (f"data.store={run / 'moved'}", *overrides)
    toy_run = toy.make(*settings)
    enlarge(toy_run)
    # Afterwards: in bf16 the optimizer's weights are then no more what rounding made of them.
    toy_run.steps(STEP)
    root = run / "checkpoints"
    staging = checkpoints.make_staging(root, STEP)
    state.save(toy_run.trainable, staging, 0)
    text = load(None, [*toy.SETTINGS, *settings])[1]
    identity = Identity(text, {}, vocabulary.checksum, "content")
    Record(STEP, 32, {}, identity, {"tensor": 1}, {}, {}).save(staging)
    checkpoints.commit(staging, root, STEP)
    (stage,) = toy_run.trainable.stages
    return {
        name: tensor.detach().float().numpy()
        for name, tensor in stage.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
