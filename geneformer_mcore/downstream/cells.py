"""Cells that a trained model is used on, by row number, in the order in which they lie.

a.h5ad | SOMA Experiment  ->  counts  ->  ranked by the model's vocabulary  ->  RaggedCells
token store               ->  tokens, if they are of that vocabulary        ->  RaggedCells
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from geneformer_mcore.cells.corpus import InputOptions, find_genes
from geneformer_mcore.cells.genes import map_genes
from geneformer_mcore.cells.ranks import RankEncoder
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.contracts import RaggedCells
from geneformer_mcore.errors import DataError
from geneformer_mcore.feed.batch import truncate
from geneformer_mcore.store.layout import MANIFEST_FILE, OBS, VOCABULARY_FILE
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.soma_io import SomaReader


class Cells(Protocol):
    """Cells in a fixed order. A cell without a known gene is its [CLS] alone.

    path: the h5ad file they are of; None where there is none
    """

    path: Path | None

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, at most the model's seq_length tokens each."""
        ...

    def obs(self) -> pd.DataFrame:
        """What is known of every cell, indexed by its name."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


def open_cells(
    source: str, vocabulary: Vocabulary, seq_length: int, options: InputOptions
) -> Cells:
    """The cells of a token store, an h5ad file or an Experiment. Raises DataError if they do not
    suit the vocabulary, or cannot be read."""
    folder = Path(source)
    if "://" not in source and (folder / MANIFEST_FILE).exists():
        return StoredCells(source, vocabulary, seq_length)
    with naming_our_options():
        return CountedCells(source, vocabulary, seq_length, options)


class CountedCells:
    """Cells of a file of counts, ranked as they are read, as they are for a store.

    counts:   the open file;  genes: its columns as tokens;  encoder: what ranks them
    """

    def __init__(
        self, source: str, vocabulary: Vocabulary, seq_length: int, options: InputOptions
    ) -> None:
        self.counts = options.open(source)
        genes = find_genes(self.counts, options, vocabulary)
        allow = options.allow_low_overlap
        self.genes = map_genes(genes, vocabulary, source, allow, options.allow_no_overlap)
        self.encoder = RankEncoder(vocabulary, seq_length)
        self.path = Path(source) if "://" not in source and Path(source).is_file() else None

    def __len__(self) -> int:
        return self.counts.num_cells

    def read(self, start: int, stop: int) -> RaggedCells:
        """Implements Cells. Cells have no keys here: nothing of them is masked."""
        tokens, lengths = [np.empty(0, np.uint16)], [np.empty(0, np.int64)]
        with naming_our_options():
            for block in self.counts.blocks(start=start, stop=stop):
                ranked = self.encoder.encode(block, self.genes.token_of_column)
                tokens.append(ranked.tokens_T)
                lengths.append(np.diff(ranked.offsets))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        return RaggedCells(np.concatenate(tokens), offsets, np.zeros(stop - start, np.uint64))

    def obs(self) -> pd.DataFrame:
        """Implements Cells."""
        return self.counts.read_obs(0, len(self))

    def close(self) -> None:
        """Implements Cells."""
        self.counts.close()


class StoredCells:
    """Cells of a token store, or of one split of it, in its order."""

    path: Path | None = None

    def __init__(
        self, source: str, vocabulary: Vocabulary, seq_length: int, split: str = ""
    ) -> None:
        self.store = TokenStore.open(source)
        self._start, self._stop = self.store.rows(split) if split else (0, len(self.store))
        self._seq_length = seq_length
        found = self.store.vocabulary.checksum
        if found != vocabulary.checksum:
            raise DataError(
                f"{source}: its {VOCABULARY_FILE} (checksum {found[:12]}) must be the model's "
                f"(checksum {vocabulary.checksum[:12]}): its token ids mean other genes. Remedy: "
                "give the h5ad files of these cells, or build a store of them with --vocabulary "
                "and the model's vocabulary."
            )

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, stop: int) -> RaggedCells:
        """Implements Cells."""
        return self._read(self._start + start, self._start + stop)

    def training_cells(self, most: int) -> RaggedCells:
        """The first `most` of the store's training cells."""
        start, stop = self.store.rows("train")
        return self._read(start, min(stop, start + most))

    def _read(self, start: int, stop: int) -> RaggedCells:
        return truncate(self.store.read(start, stop), self._seq_length)

    def obs(self) -> pd.DataFrame:
        """Implements Cells."""
        with SomaReader(self.store.path) as reader:
            table = reader.read(OBS, self._start, self._stop, reader.columns(OBS))
        return table.to_pandas().set_index("cell_id")

    def close(self) -> None:
        """Implements Cells."""
        self.store.close()


@contextmanager
def naming_our_options() -> Iterator[None]:
    """What is wrong with counts is told with the options of data_prep/, where --layer is the layer
    of the counts; here that is the model's."""
    try:
        yield
    except DataError as error:
        raise type(error)(str(error).replace("--layer", "--counts-layer")) from error
