"""Which genes' states move most under each perturbation, added up over cells.

per token of every variant: 1 - cosine  ->  sum, number of cells [perturbations, genes]
  ->  added up over ranks  ->  the most moved genes of each perturbation, as a table
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from geneformer_mcore.distributed import collectives
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.perturb.question import GeneNames, Perturbation

MOST_BYTES = 4 << 30


class MovedGenes:
    """Sums over cells, of perturbations 0..number-1 and the genes that stand in any sentence."""

    def __init__(self, number: int, genes_G: np.ndarray, vocabulary_size: int) -> None:
        """genes_G: int64, the tokens of these genes. Raises ConfigError where the sums would not
        fit memory."""
        self.number, self.genes_G = number, genes_G
        needed = 2 * 8 * number * len(genes_G)
        if needed > MOST_BYTES:
            raise ConfigError(
                f"the shifts of {len(genes_G):,} genes under {number:,} perturbations need "
                f"{needed / 2**30:.1f} GiB of memory, and at most {MOST_BYTES / 2**30:.0f} GiB are "
                "taken for them. Remedy: fewer genes at a time, or no --gene-effects."
            )
        self._column_of = np.full(vocabulary_size, -1, np.int64)
        self._column_of[genes_G] = np.arange(len(genes_G))
        self._sums = np.zeros((number, len(genes_G)))
        self._cells = np.zeros((number, len(genes_G)))

    def add(self, which_T: np.ndarray, tokens_T: np.ndarray, moved_T: np.ndarray) -> None:
        """Adds the shifts (float32, NaN for none) of tokens under the perturbations `which_T`.
        Perturbations from `number` on are left out."""
        counts = ~np.isnan(moved_T) & (which_T < self.number)
        place = (which_T[counts], self._column_of[tokens_T[counts]])
        np.add.at(self._sums, place, moved_T[counts])
        np.add.at(self._cells, place, 1)

    def gather(self, device: torch.device) -> None:
        """Adds up what all ranks have, on the first one."""
        for values in (self._sums, self._cells):
            collectives.add_up_on_first_rank(values, device)

    def table(self, perturbations: list[Perturbation], names: GeneNames, most: int) -> pd.DataFrame:
        """The `most` moved genes of each perturbation, most moved first."""
        with np.errstate(invalid="ignore"):
            means = self._sums / self._cells
        frames = []
        for number, perturbation in enumerate(perturbations):
            order = np.argsort(-np.nan_to_num(means[number], nan=-1), kind="stable")[:most]
            order = order[self._cells[number, order] > 0]
            tokens = self.genes_G[order].tolist()
            frames.append(
                pd.DataFrame(
                    {
                        "perturbation": perturbation.name,
                        "feature_id": [names.id_of(token) for token in tokens],
                        "gene": [names.symbol(token) for token in tokens],
                        "n_cells": self._cells[number, order].astype(np.int64),
                        "shift": means[number, order],
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)
