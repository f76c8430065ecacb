"""tiledbsoma-ml: ExperimentDataset over a SOMA experiment, shuffled in chunks of 64 cells.

    cells.h5ad   ->  tiledbsoma.io.from_h5ad  ->  X (cell, gene) -> count   ->  ExperimentDataset
    tokens_h5ad  ->  the same                 ->  X (cell, rank) -> token   ->  ... -> padded batch

Everything is as its documentation has it: default chunks and I/O batches, experiment_dataloader, no
worker processes (sparse batches cannot cross them). Dense batches are its default, sparse ones its
fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness.common import SEQ_LENGTH
from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant
from benchmarks.harness.peers.tokenisers import HFTokeniser


def experiment(data: Prepared) -> None:
    """The raw counts as a SOMA experiment, with tiledbsoma's own settings."""
    _from_h5ad(data.place("experiment"), data.counts_file)


def token_experiment(data: Prepared) -> None:
    """The tokens as a SOMA experiment: ranks in place of genes, token ids in place of counts."""
    _from_h5ad(data.place("token_experiment"), data.place("tokens_h5ad"))


def _from_h5ad(target: Path, source: Path) -> None:
    import tiledbsoma.io

    tiledbsoma.io.from_h5ad(str(target), str(source), measurement_name="RNA")


class SomaSparse(contestant.Contestant):
    """Batches are (obs, CSR counts)."""

    label = "tiledbsoma-ml, sparse batches"
    table = contestant.COUNTS
    package = "tiledbsoma-ml"
    formats: ClassVar[contestant.Formats] = (experiment,)
    folder = "experiment"
    is_sparse = True

    def __init__(self, data: Prepared) -> None:
        import tiledbsoma
        from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

        self._experiment = tiledbsoma.Experiment.open(str(data.place(self.folder)))
        self._dataset = ExperimentDataset(
            self._experiment.axis_query(measurement_name="RNA"),
            layer_name="data",
            batch_size=contestant.BATCH_SIZE,
            shuffle=True,
            seed=contestant.SEED,
            return_sparse_X=self.is_sparse,
        )
        self._batches = experiment_dataloader(self._dataset)

    def epoch(self, number: int) -> Iterator[Any]:
        self._dataset.set_epoch(number)
        return ((obs, self.batch(counts)) for counts, obs in self._batches)

    def batch(self, counts: Any) -> Any:
        """The content of a batch."""
        return counts

    def cells(self, batch: Any) -> np.ndarray:
        return batch[0]["soma_joinid"].to_numpy()


class SomaDense(SomaSparse):
    """Batches are (obs, dense counts)."""

    label = "tiledbsoma-ml, dense batches"
    is_sparse = False


class SomaTokenised(SomaSparse):
    """Raw counts, tokenised by the leaner of the HF-style tokenisers, and padded."""

    label = "tiledbsoma-ml on counts, then HF-style tokenising"
    table = contestant.TOKENS

    def __init__(self, data: Prepared) -> None:
        super().__init__(data)
        medians = data.vocabulary.medians_of_token
        self._tokeniser = HFTokeniser(data.token_of_column, medians, SEQ_LENGTH)

    def batch(self, counts: Any) -> Any:
        return contestant.padded(self._tokeniser.lean(counts))


class SomaTokens(SomaSparse):
    """Tokens as a sparse X of (cell, rank), padded."""

    label = "tiledbsoma-ml, X of (cell, rank)"
    table = contestant.TOKENS
    formats = (contestant.tokens_h5ad, token_experiment)
    folder = "token_experiment"

    def batch(self, counts: Any) -> Any:
        return contestant.padded(np.split(counts.data, counts.indptr[1:-1]), with_cls=False)
