"""A corpus: several files of counts, how to read them, and the vocabulary they make together.

files  ->  genes of each, all of one kind of id?  ->  medians over all cells  ->  Vocabulary
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from geneformer_mcore.cells.counts import CountsFile
from geneformer_mcore.cells.genes import GeneIds, find_gene_ids, is_ensembl_id
from geneformer_mcore.cells.medians import MedianCollector
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError


@dataclass(frozen=True)
class InputOptions:
    """How input files are read.

    layer:              the layer of the counts; None: layers["counts"], raw.X, X, in that order
    symbols:            {symbol: gene id} for files that name genes by symbol
    allow_normalised:   counts need not be whole numbers (they may be scaled per cell)
    allow_low_overlap:  files with under 10 % of their genes in the vocabulary are taken too
    allow_no_overlap:   so are files with none of their genes in it
    """

    layer: str | None = None
    symbols: Mapping[str, str] = field(default_factory=dict)
    allow_normalised: bool = False
    allow_low_overlap: bool = False
    allow_no_overlap: bool = False

    def open(self, path: str | Path) -> CountsFile:
        """The file `path`, open as these options say."""
        return CountsFile(path, self.layer, self.allow_normalised)

    def with_own_vocabulary(self) -> InputOptions:
        """The same for a vocabulary that was made from these very files.

        It holds the genes that their cells express, so how many of a file's genes it holds says
        nothing of whether the ids of both are of one kind.
        """
        return replace(self, allow_low_overlap=True, allow_no_overlap=True)


def find_genes(
    counts: CountsFile, options: InputOptions, known: Collection[str] | None = None
) -> GeneIds:
    """The gene id of each column of an open file (see genes.find_gene_ids)."""
    return find_gene_ids(counts.gene_columns(), known, options.symbols)


def build_vocabulary(paths: Sequence[str | Path], options: InputOptions) -> Vocabulary:
    """The genes that the cells of these files express, with exact medians over all of them.

    Raises DataError for files that cannot be used, or that name genes by ids of different kinds.
    """
    if not paths:
        raise DataError("no input file given. Remedy: name one h5ad file or more.")
    collector = MedianCollector()
    names: dict[str, str] = {}
    ensembl_share: dict[str, float] = {}
    for path in sorted(map(Path, paths)):
        with options.open(path) as counts:
            genes = find_genes(counts, options)
            ensembl_share[str(path)] = _ensembl_share(genes)
            _check_one_kind(ensembl_share)
            for gene, name in zip(genes.ids, counts.gene_names(), strict=True):
                names.setdefault(gene, name)
            collector.add(counts.blocks(), genes.ids)
    return collector.vocabulary(names)


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


def _ensembl_share(genes: GeneIds) -> float:
    ids = [gene for gene in genes.ids if gene]
    return sum(map(is_ensembl_id, ids)) / max(1, len(ids))


def _check_one_kind(ensembl_share: Mapping[str, float]) -> None:
    with_ids = [path for path, share in ensembl_share.items() if share >= 0.5]
    without = [path for path, share in ensembl_share.items() if share < 0.5]
    if with_ids and without:
        raise DataError(
            f"{without[0]} names {ensembl_share[without[0]]:.0%} of its genes by Ensembl ids, "
            f"{with_ids[0]} {ensembl_share[with_ids[0]]:.0%}: one vocabulary takes one kind of id. "
            "Remedy: --symbols FILE with symbol -> id, or give var an `ensembl_id` column."
        )
