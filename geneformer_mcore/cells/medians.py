"""A vocabulary with medians from a corpus of counts, exact.

    blocks of counts  ->  count / total * 10,000 of every expressed gene  ->  all values by gene
                      ->  median of each  ->  Vocabulary of the genes that some cell expresses

Every value is kept until the end: 12 bytes per expressed gene of every cell, about 20 MB per
thousand cells. Cells without counts do not take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from geneformer_mcore.cells.normalise import CountBlock, normalised_values
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError


class MedianCollector:
    """Collects the normalised values of each gene from any number of files, in any order."""

    def __init__(self) -> None:
        self._place_of_gene: dict[str, int] = {}
        self._places: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, blocks: Iterable[CountBlock], gene_ids: Iterable[str]) -> int:
        """Takes in the blocks of one file; gene_ids: one per column, "" for a column to leave out.

        Returns the number of cells.
        """
        places = self._place_of_gene
        # Place 0 stands for "no gene" in the gathering, so places count from 1.
        column_places = np.array(
            [places.setdefault(gene, len(places) + 1) if gene else 0 for gene in gene_ids],
            dtype=np.int32,
        )
        num_cells = 0
        for block in blocks:
            genes, values = normalised_values(block, column_places, len(places) + 1)
            self._places.append(genes.copy())
            self._values.append(values.copy())
            num_cells += len(block)
        return num_cells

    def vocabulary(self, names: Mapping[str, str] | None = None) -> Vocabulary:
        """The genes that were expressed, with their medians; names: {gene id: symbol}."""
        medians = self.medians()
        if not medians:
            raise DataError(
                "no cell expresses a gene that has an id: there is no vocabulary to build. Remedy: "
                "check the counts and the gene ids of the files."
            )
        return Vocabulary.from_medians(medians, names)

    def medians(self) -> dict[str, float]:
        """{gene id: exact median of its non-zero values}, for genes with at least one value."""
        if not self._places:
            return {}
        places, values = np.concatenate(self._places), np.concatenate(self._values)
        order = np.argsort(places, kind="stable")
        values = values[order]
        counts = np.bincount(places, minlength=len(self._place_of_gene) + 1)
        stops = np.cumsum(counts)
        return {
            gene: float(np.median(values[stops[place] - counts[place] : stops[place]]))
            for gene, place in self._place_of_gene.items()
            if counts[place]
        }
