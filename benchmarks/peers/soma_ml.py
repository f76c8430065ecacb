"""tiledbsoma-ml: ExperimentDataset over a SOMA experiment, shuffled in chunks of 64 cells.

    cells.h5ad   ->  tiledbsoma.io.from_h5ad  ->  X (cell, gene) -> count   ->  ExperimentDataset
    tokens_h5ad  ->  the same                 ->  X (cell, rank) -> token   ->  ... -> padded batch

Everything is as its documentation has it: default chunks and I/O batches, experiment_dataloader, no
worker processes (sparse batches cannot cross them). Dense batches are its default, sparse ones its
fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.peers.contestant import BATCH_SIZE, COUNTS, SEED, TOKENS, Contestant
from benchmarks.peers.hf_tokeniser import HFTokeniser
from benchmarks.peers.padding import padded, sums_of_padded
from benchmarks.peers.token_files import tokens_h5ad
from benchmarks.side_by_side.prepared import SEQ_LENGTH, Prepared


def experiment(data: Prepared) -> None:
    """The raw counts as a SOMA experiment, with tiledbsoma's own settings."""
    import tiledbsoma.io

    source = str(data.counts_file)
    target = str(data.place("experiment"))
    tiledbsoma.io.from_h5ad(target, source, measurement_name="RNA")


def token_experiment(data: Prepared) -> None:
    """The tokens as a SOMA experiment: ranks in place of genes, token ids in place of counts."""
    import tiledbsoma.io

    source = str(data.place("tokens_h5ad"))
    target = str(data.place("token_experiment"))
    tiledbsoma.io.from_h5ad(target, source, measurement_name="RNA")


class _OverExperiment(Contestant):
    package = "tiledbsoma-ml"
    folder = "experiment"
    is_sparse = True

    def __init__(self, data: Prepared) -> None:
        import tiledbsoma
        from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

        self._experiment = tiledbsoma.Experiment.open(str(data.place(self.folder)))
        query = self._experiment.axis_query(measurement_name="RNA")
        self._dataset = ExperimentDataset(
            query,
            layer_name="data",
            batch_size=BATCH_SIZE,
            shuffle=True,
            seed=SEED,
            return_sparse_X=self.is_sparse,
        )
        self._batches = experiment_dataloader(self._dataset)

    def epoch(self, number: int) -> Iterator[Any]:
        self._dataset.set_epoch(number)
        return iter(self._batches)

    def cells(self, batch: Any) -> np.ndarray:
        return batch[1]["soma_joinid"].to_numpy()

    def sums(self, batch: Any) -> np.ndarray:
        return np.asarray(batch[0].sum(axis=1, dtype=np.float64)).ravel()


class SomaDense(_OverExperiment):
    """Batches are (dense counts, obs)."""

    label = "tiledbsoma-ml, dense batches"
    table = COUNTS
    formats = (experiment,)
    is_sparse = False


class SomaSparse(_OverExperiment):
    """Batches are (CSR counts, obs)."""

    label = "tiledbsoma-ml, sparse batches"
    table = COUNTS
    formats = (experiment,)


class SomaTokenised(_OverExperiment):
    """Raw counts, tokenised by the leaner of the HF-style tokenisers, and padded."""

    label = "tiledbsoma-ml on counts, then HF-style tokenising"
    table = TOKENS
    formats = (experiment,)

    def __init__(self, data: Prepared) -> None:
        super().__init__(data)
        medians = data.vocabulary.medians_of_token
        self._tokeniser = HFTokeniser(data.token_of_column, medians, SEQ_LENGTH)

    def epoch(self, number: int) -> Iterator[Any]:
        for counts, obs in super().epoch(number):
            yield padded(self._tokeniser.lean(counts)), obs

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_padded(batch[0])


class SomaTokens(_OverExperiment):
    """Tokens as a sparse X of (cell, rank), padded."""

    label = "tiledbsoma-ml, X of (cell, rank)"
    table = TOKENS
    formats = (tokens_h5ad, token_experiment)
    folder = "token_experiment"

    def epoch(self, number: int) -> Iterator[Any]:
        for ranks, obs in super().epoch(number):
            cells = np.split(ranks.data, ranks.indptr[1:-1])
            yield padded(cells, with_cls=False), obs

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_padded(batch[0])
