"""How the files of a corpus are read, and which gene each of their columns is.

file | Experiment | AnnData  +  InputOptions  ->  Counts, open  ->  GeneIds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.h5ad import Counts
from geneformer_mcore.tokenizer import gencode
from geneformer_mcore.tokenizer.genes import (
    GeneIds,
    Table,
    find_gene_ids,
    is_ensembl_id,
    names_as_symbols,
)
from geneformer_mcore.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class InputOptions:
    """How input files are read.

    layer:              the layer of the counts; None: layers["counts"], raw.X, X, in that order
    symbols:            {symbol: gene id} for files that name genes by symbol
    default_symbols:    gives such a table where none is given and one is needed, or None
    allow_normalised:   counts need not be whole numbers (they may be scaled per cell)
    allow_low_overlap:  files with under 10 % of their genes in the vocabulary are taken too
    allow_no_overlap:   so are files with none of their genes in it
    """

    layer: str | None = None
    symbols: Mapping[str, str] = field(default_factory=dict)
    allow_normalised: bool = False
    allow_low_overlap: bool = False
    allow_no_overlap: bool = False
    default_symbols: Table = gencode.default_symbols

    def open(self, source: Any) -> Counts:
        """The counts of a file, SOMA Experiment or AnnData, open as these options say."""
        return open_counts(source, self.layer, self.allow_normalised)

    def with_own_vocabulary(self) -> InputOptions:
        """The same for a vocabulary that was made from these very files.

        It holds the genes that their cells express, so how many of a file's genes it holds says
        nothing of whether the ids of both are of one kind.
        """
        return replace(self, allow_low_overlap=True, allow_no_overlap=True)


def find_genes(
    counts: Counts, options: InputOptions, vocabulary: Vocabulary | None = None
) -> GeneIds:
    """The gene id of each column of open counts (see genes.find_gene_ids).

    Symbols are mapped by options.symbols if given; else by the names of the vocabulary; else, for
    human genes, by options.default_symbols.
    """
    tables: dict[str, Table] = {}
    if vocabulary is not None and not options.symbols:
        tables["the vocabulary's names"] = lambda: names_as_symbols(vocabulary)
    if not options.symbols and (vocabulary is None or _is_human(vocabulary)):
        tables["GENCODE"] = options.default_symbols
    known = None if vocabulary is None else vocabulary.token_ids
    return find_gene_ids(counts.gene_columns(), known, options.symbols, tables)


def _is_human(vocabulary: Vocabulary) -> bool:
    ids = vocabulary.feature_ids
    return sum(gene.startswith("ENSG0") for gene in ids) * 2 >= len(ids)


def describe_other_ids(vocabulary: Vocabulary) -> str | None:
    """What to tell of a vocabulary most of whose ids are no Ensembl ids; None if most are.

    They are genes like others, of any species; but symbols make for a vocabulary of its own.
    """
    ids = vocabulary.feature_ids
    others = [gene for gene in ids if not is_ensembl_id(gene)]
    if len(others) * 2 <= len(ids):
        return None
    return (
        f"{len(others):,} of {len(ids):,} gene ids look like symbols, not like Ensembl ids "
        f"({', '.join(others[:3])}): they are taken as they are, and go only with files that name "
        "genes alike. Remedy, if ids are meant: --symbols FILE with symbol -> id."
    )
