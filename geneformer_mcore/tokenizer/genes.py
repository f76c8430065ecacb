"""From the var of an input to the token of each of its columns.

find_genes: feature_id | ensembl_id | gene_ids | index  ->  versions and blanks removed
            symbols, where there are no ids: a given table | the vocabulary's names | GENCODE
map_genes:  gene ids, Vocabulary  ->  GeneMap: token of each column (0: unknown gene)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError, shown
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.frames import NAME_COLUMNS
from geneformer_mcore.io.h5ad import Counts
from geneformer_mcore.tokenizer.gencode import clean_id, default_symbols, is_ensembl_id
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

ID_COLUMNS = ("feature_id", "ensembl_id", "gene_ids", "index")
"""Columns of `var` with gene ids, in order of preference; "index" is its row names."""

_ENOUGH = 0.9
"""Where a table knows so much of a column, the next one is not read."""

MIN_OVERLAP = 0.10
"""A file with less than this share of the vocabulary's genes, and of its own counts in known genes,
is refused unless allowed."""

_PLACES, _ROWS_PER_PLACE = 8, 32
"""Of the cells by which the share of counts is judged."""


@dataclass(frozen=True)
class GeneIds:
    """The cleaned gene id of every column of a file ("" for none), and their location in var.

    num_mapped_symbols:  columns whose id is from a table of symbols
    symbols_from:        the tables: "the given table", "the vocabulary's names", "GENCODE"
    """

    ids: tuple[str, ...]
    location: str
    num_mapped_symbols: int = 0
    symbols_from: str = ""

    @property
    def num_blank(self) -> int:
        """Columns without an id."""
        return sum(not gene for gene in self.ids)


Table = Callable[[], Mapping[str, str] | None]
"""Reads {symbol: id}; None: there is no table."""


def find_gene_ids(
    columns: Mapping[str, Sequence[object]],
    known: Collection[str] | None = None,
    symbols: Mapping[str, str] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> GeneIds:
    """Gene ids from the first of ID_COLUMNS that holds ids, else by symbols.

    A column holds ids if at least half of its values are known, or have the form of an Ensembl id
    while at least one is known. Columns of other names come after ID_COLUMNS. Where none does,
    `tables` are read in turn, each for what those before leave open, until nearly all of a column
    is known; then the column with the most known genes is taken, as it is if no table knows more.

    columns:  {name: one value per gene} of `var`, "index" always among them
    known:    the ids of the vocabulary; None: all of the form of an Ensembl id
    symbols:  the user's {symbol: id}, for values that are not known themselves
    tables:   {origin: table} for files that name genes by symbol
    """
    ordered = [name for name in (*ID_COLUMNS, *NAME_COLUMNS) if name in columns]
    ordered += [name for name in columns if name not in ordered]
    finder = _Finder({name: columns[name] for name in ordered}, known)
    plain: list[GeneIds] = []
    for name in ordered:
        plain.append(finder.map(name, symbols or {}, "the given table"))
        if finder.share_known(plain[-1]) >= 0.5:
            return plain[-1]
    ensembl = [one for one in plain if finder.is_ensembl(one.location)]
    for one in ensembl:
        if finder.num_known(one):
            return one
    found, table, origins = list(plain), dict(symbols or {}), []
    for origin, get in () if ensembl else (tables or {}).items():
        more = get()
        if not more:
            continue
        table = {**more, **table}
        origins.append(origin)
        mapped = [finder.map(name, table, " and ".join(origins)) for name in ordered]
        # Without a vocabulary, a table that does not fit must not throw most genes away.
        found += [one for one in mapped if known is not None or finder.share_known(one) >= 0.5]
        if any(finder.share_known(one) >= _ENOUGH for one in mapped):
            break
    return max(found, key=finder.num_known)


class _Finder:
    """Columns, each cleaned when it is first read, and which of their genes are known."""

    def __init__(
        self, columns: Mapping[str, Sequence[object]], known: Collection[str] | None
    ) -> None:
        self._columns = columns
        self._has_vocabulary = known is not None
        self._is_known = is_ensembl_id if known is None else known.__contains__
        self._cleaned: dict[str, list[str]] = {}

    def _genes(self, name: str) -> list[str]:
        if name not in self._cleaned:
            self._cleaned[name] = list(map(clean_id, self._columns[name]))
        return self._cleaned[name]

    def map(self, name: str, symbols: Mapping[str, str], origin: str) -> GeneIds:
        """A column with its unknown values mapped by `symbols`."""
        genes, is_known = self._genes(name), self._is_known
        if not symbols:
            return GeneIds(tuple(genes), name)

        def by_symbol(gene: str) -> str:
            # Without a vocabulary, an unmapped symbol would become a gene.
            return symbols.get(gene, gene if self._has_vocabulary else "")

        ids = tuple(gene if is_known(gene) else by_symbol(gene) for gene in genes)
        changed = sum(bool(b) and a != b for a, b in zip(genes, ids, strict=True))
        return GeneIds(ids, name, changed, origin if changed else "")

    def num_known(self, found: GeneIds) -> int:
        """Columns whose gene is known."""
        return sum(map(self._is_known, filter(None, found.ids)))

    def share_known(self, found: GeneIds) -> float:
        """Their share of the columns that are not blank in the file."""
        return self.num_known(found) / max(1, sum(map(bool, self._genes(found.location))))

    def is_ensembl(self, name: str) -> bool:
        """Whether at least half of a column has the form of Ensembl ids."""
        genes = [gene for gene in self._genes(name) if gene]
        return bool(genes) and sum(map(is_ensembl_id, genes)) * 2 >= len(genes)


def names_as_symbols(vocabulary: Vocabulary) -> dict[str, str]:
    """{name: id} of the vocabulary's names that are of one gene only and not its id."""
    times = Counter(vocabulary.names)
    pairs = zip(vocabulary.names, vocabulary.feature_ids, strict=True)
    return {name: gene for name, gene in pairs if times[name] == 1 and name != gene}


@dataclass(frozen=True)
class GeneMap:
    """The columns of one file as tokens.

    token_of_column:  int32 [columns], 0 for a column that is not in the vocabulary
    num_known:        distinct genes of the file that are in the vocabulary
    num_unknown:      distinct genes of the file that are not
    num_blank:        columns without an id, dropped
    num_repeated:     columns beyond the first of their gene, whose counts are summed
    share_of_vocabulary:  of its genes, those of the file
    """

    token_of_column: np.ndarray
    location: str
    num_known: int
    num_unknown: int
    num_blank: int
    num_repeated: int
    num_mapped_symbols: int
    share_of_vocabulary: float


def map_genes(
    genes: GeneIds,
    vocabulary: Vocabulary,
    counts: Counts,
    options: InputOptions | None = None,
) -> GeneMap:
    """The tokens of a file's genes. Raises DataError where too little is in the vocabulary: under
    10 % of its genes, and of the counts; a panel has few genes, and a whole genome many others."""
    options = options or InputOptions()
    tokens = vocabulary.token_ids
    token_of_column = np.array([tokens.get(gene, 0) for gene in genes.ids], dtype=np.int32)
    distinct = {gene for gene in genes.ids if gene}
    num_known = sum(gene in tokens for gene in distinct)
    gene_map = GeneMap(
        token_of_column,
        genes.location,
        num_known,
        len(distinct) - num_known,
        genes.num_blank,
        len(genes.ids) - genes.num_blank - len(distinct),
        genes.num_mapped_symbols,
        num_known / len(tokens),
    )
    allowed = options.allow_low_overlap if num_known else options.allow_no_overlap
    if distinct and (allowed or gene_map.share_of_vocabulary >= MIN_OVERLAP):
        return gene_map
    covered = known_counts(counts, token_of_column) if num_known else 0.0
    if covered < MIN_OVERLAP:
        raise DataError(_overlap_message(genes, distinct, gene_map, covered, vocabulary, counts))
    return gene_map


def known_counts(counts: Counts, token_of_column: np.ndarray) -> float:
    """Share of the counts of some cells, from all over the file, that known genes hold."""
    places = {counts.num_cells * place // _PLACES for place in range(_PLACES)}
    known = total = 0.0
    for start in sorted(places):
        block = counts.read_rows(start, min(start + _ROWS_PER_PLACE, counts.num_cells))
        known += float(block.data[token_of_column[block.indices] > 0].sum())
        total += float(block.data.sum())
    return known / total if total else 0.0


def _overlap_message(
    genes: GeneIds,
    distinct: set[str],
    gene_map: GeneMap,
    covered: float,
    vocabulary: Vocabulary,
    counts: Counts,
) -> str:
    unknown = sorted(gene for gene in distinct if gene not in vocabulary.token_ids)
    allow = ", or `allow_low_overlap=True` if so few genes are meant" if gene_map.num_known else ""
    mapped = (
        f", {genes.num_mapped_symbols:,} of them mapped from symbols by {genes.symbols_from}"
        if genes.num_mapped_symbols
        else ""
    )
    return (
        f"{counts.name}: {gene_map.num_known:,} of {len(distinct):,} genes are in the "
        f"vocabulary{mapped}: {gene_map.share_of_vocabulary:.1%} of its genes and {covered:.1%} of "
        f"the counts, and one must be at least {MIN_OVERLAP:.0%}. Gene ids of the file "
        f"(var {genes.location}): {', '.join(unknown[:3]) or 'all blank'}; of the vocabulary: "
        f"{', '.join(vocabulary.feature_ids[:3])}. Remedy: give the file's var a column "
        "`feature_id` or `ensembl_id` with ids of the vocabulary's kind, or a table symbol -> id "
        f"with `symbols=FILE` or the variable GENEFORMER_GENCODE{allow}."
    )


@dataclass(frozen=True)
class InputOptions:
    """How input files are read.

    layer:              the layer of the counts; None: layers["counts"], raw.X, X, in that order
    symbols:            {symbol: gene id} for files that name genes by symbol
    default_symbols:    reads such a table where none is given and one is needed
    allow_normalised:   counts need not be whole numbers (they may be scaled per cell)
    allow_low_overlap, allow_no_overlap:  see map_genes
    allow_external:     parts of an input may lie in other files
    """

    layer: str | None = None
    symbols: Mapping[str, str] = field(default_factory=dict)
    allow_normalised: bool = False
    allow_low_overlap: bool = False
    allow_no_overlap: bool = False
    default_symbols: Table = default_symbols
    allow_external: bool = False

    def open(self, source: Any) -> Counts:
        """The counts of a file, SOMA Experiment or AnnData, with these options."""
        return open_counts(source, self.layer, self.allow_normalised, self.allow_external)

    def with_own_vocabulary(self) -> InputOptions:
        """The options for a vocabulary built from the same files: it holds the genes that their
        cells express, so their overlap does not show whether the ids of both are of one kind."""
        return replace(self, allow_low_overlap=True, allow_no_overlap=True)


def find_genes(
    counts: Counts, options: InputOptions, vocabulary: Vocabulary | None = None
) -> GeneIds:
    """The gene id of each column of open counts (see find_gene_ids).

    Symbols are mapped by options.symbols if given; else by the names of the vocabulary; else, for
    human genes, by options.default_symbols.
    """

    def gencode() -> Mapping[str, str] | None:
        ids = () if vocabulary is None else vocabulary.feature_ids
        is_human = sum(gene.startswith("ENSG0") for gene in ids) * 2 >= len(ids)
        return options.default_symbols() if is_human else None

    tables: dict[str, Table] = {}
    if vocabulary is not None:
        tables["the vocabulary's names"] = lambda: names_as_symbols(vocabulary)
    tables["GENCODE"] = gencode
    if options.symbols:
        tables = {}
    known = None if vocabulary is None else vocabulary.token_ids
    return find_gene_ids(counts.gene_columns(), known, options.symbols, tables)


def describe_other_ids(vocabulary: Vocabulary) -> str | None:
    """The warning about a vocabulary most of whose ids are no Ensembl ids; None if most are."""
    ids = vocabulary.feature_ids
    others = [gene for gene in ids if not is_ensembl_id(gene)]
    if len(others) * 2 <= len(ids):
        return None
    return shown(
        f"{len(others):,} of {len(ids):,} gene ids look like symbols, not like Ensembl ids "
        f"({', '.join(others[:3])}): they are taken as they are, and go only with files that name "
        "genes alike. Remedy, if ids are meant: `symbols=FILE` with symbol -> id."
    )
