"""What launch/perturb.py is asked: which genes, in which cells, compared with what.

options  ->  Question, checked  ->  its genes and groups by the names of a file  ->  Perturbations
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.perturb.perturbed_cells import Mode
from geneformer_mcore.tokenizer.gencode import clean_id
from geneformer_mcore.tokenizer.genes import names_as_symbols
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS

# What is perturbed: genes and groups of genes, by name, as tokens of the model.
#
# ENSG... | symbol, of the file or the vocabulary  ->  token  ->  Perturbation
# groups: a.json {name: [genes]} | a.gmt           ->  tokens ->  Perturbation

MOST_LISTED = 10


@dataclass(frozen=True)
class Perturbation:
    """Genes that are deleted, or put in front, at once.

    name:    the gene's symbol where one is known, else its id; or the name of the group
    tokens:  of its genes, in the order given, each once
    """

    name: str
    tokens: tuple[int, ...]


def what_is_done(tokens: tuple[int, ...], mode: Mode) -> tuple[int, ...]:
    """The same for perturbations that make the same of every cell: in which order genes are deleted
    does not matter, and that in which they are put in front does."""
    return tokens if mode is Mode.overexpress else tuple(sorted(tokens))


class GeneNames:
    """Every name under which a gene of the model may be asked for.

    Ids of the vocabulary come first, then the symbols of the file, of a table, of the vocabulary. A
    symbol that stands for several genes is none.
    """

    def __init__(
        self, vocabulary: Vocabulary, of_file: Mapping[str, int], table: Mapping[str, str]
    ):
        self._vocabulary = vocabulary
        known = vocabulary.token_ids
        named = names_as_symbols(vocabulary)
        self._tokens = {name: known[gene] for name, gene in named.items()}
        self._tokens |= {name: known[gene] for name, gene in table.items() if gene in known}
        self._tokens |= of_file
        self._tokens |= known
        symbols = {token: name for name, token in reversed([*of_file.items()])}
        self._symbols = {known[gene]: name for name, gene in named.items()} | symbols

    @classmethod
    def of(cls, cells: CountedCells, vocabulary: Vocabulary, table: Mapping[str, str]) -> GeneNames:
        """Those for a file; table: {symbol: id}, as the user gave it."""
        found: dict[str, int] = {}
        several = set()
        tokens = cells.genes.token_of_column.tolist()
        for name, token in zip(cells.counts.gene_names(), tokens, strict=True):
            if token and found.setdefault(name, token) != token:
                several.add(name)
        return cls(vocabulary, {n: t for n, t in found.items() if n not in several}, table)

    def token(self, name: str) -> int:
        """The token of a gene, 0 if it is not known."""
        return self._tokens.get(name) or self._tokens.get(clean_id(name), 0)

    def symbol(self, token: int) -> str:
        """What people call the gene: its symbol, else its id."""
        return self._symbols.get(token, self.id_of(token))

    def id_of(self, token: int) -> str:
        """The id of the gene."""
        return self._vocabulary.feature_ids[token - NUM_SPECIALS]

    def single(self, token: int) -> Perturbation:
        """The gene alone."""
        return Perturbation(self.symbol(token), (token,))

    def singles(self, names: Iterable[str]) -> tuple[list[Perturbation], list[str]]:
        """One per gene, each once, and a line for each name of a gene that was named before. Raises
        DataError that lists those that are not known."""
        asked = list(dict.fromkeys(filter(None, names)))
        tokens = {name: self.token(name) for name in asked}
        self._refuse_unknown([name for name, token in tokens.items() if not token], len(asked))
        first: dict[int, str] = {}
        lines = [
            f"{name}: the same gene as {first[token]}, perturbed once"
            for name, token in tokens.items()
            if first.setdefault(token, name) != name
        ]
        return [self.single(token) for token in first], lines

    def groups(self, named: Mapping[str, Sequence[str]]) -> tuple[list[Perturbation], list[str]]:
        """One per group, and a line for each that has genes which are not known: they are left
        out. Raises DataError for a group of which no gene is known."""
        found, lines = [], []
        for group, names in named.items():
            tokens = [token for token in map(self.token, names) if token]
            if not tokens:
                self._refuse_unknown(list(names), len(names), f"group {group}: ")
            if len(tokens) < len(names):
                left = len(names) - len(tokens)
                lines.append(f"group {group}: {left} of {len(names)} genes are not known: left out")
            found.append(Perturbation(group, tuple(dict.fromkeys(tokens))))
        return found, lines

    def _refuse_unknown(self, unknown: list[str], asked: int, where: str = "") -> None:
        if not unknown:
            return
        by_lower = {name.lower(): name for name in self._tokens}
        listed = []
        for name in unknown[:MOST_LISTED]:
            near = difflib.get_close_matches(name.lower(), by_lower, 3, 0.75)
            like = f" (near: {', '.join(by_lower[match] for match in near)})" if near else ""
            listed.append(f"{name}{like}")
        more = len(unknown) - MOST_LISTED
        raise DataError(
            f"{where}{len(unknown):,} of {asked:,} genes are not among the "
            f"{len(self._vocabulary.feature_ids):,} that the model knows: {', '.join(listed)}"
            + (f" and {more:,} more" if more > 0 else "")
            + ". Remedy: Ensembl ids, symbols as the file has them, or `symbols=FILE`."
        )


def distinct(asked: list[Perturbation], mode: Mode) -> tuple[list[Perturbation], list[str]]:
    """Each set of genes once, each name once: rows and columns are found by their names. And a line
    for each that is left out for another of another name, which does the same."""
    found: dict[tuple[int, ...], Perturbation] = {}
    taken: set[str] = set()
    lines = []
    for perturbation in asked:
        done = what_is_done(perturbation.tokens, mode)
        if done in found:
            if perturbation.name != found[done].name:
                lines.append(f"{perturbation.name}: the same genes as {found[done].name}: left out")
            continue
        name, number = perturbation.name, 1
        while name in taken:
            number += 1
            name = f"{perturbation.name} ({number})"
        taken.add(name)
        found[done] = replace(perturbation, name=name)
    return list(found.values()), lines


def read_groups(path: Path) -> dict[str, list[str]]:
    """{group: genes} of a JSON file, or of a GMT file (name, description, genes, between tabs).
    Raises DataError where it cannot be read, is neither, or has no group."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the groups cannot be read: {error}.") from error
    found = _of_json(text, path) if path.suffix == ".json" else _of_gmt(text, path)
    empty = [name for name, genes in found.items() if not genes]
    if empty or not found:
        raise DataError(
            f"{path}: {f'group {empty[0]} has no gene' if empty else 'there is no group'}. Remedy: "
            'JSON {"group": ["gene", ...]}, or lines of name, description and genes with tabs '
            "between (.gmt)."
        )
    return found


def _of_json(text: str, path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(content, dict) or not all(
        isinstance(genes, list) and all(isinstance(gene, str) for gene in genes)
        for genes in content.values()
    ):
        raise DataError(f'{path}: must be {{"group": ["gene", ...]}}.')
    return content


def _of_gmt(text: str, path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("\t"))
        if not rest or name in found:
            reason = "its name stands before" if name in found else "there is no tab in it"
            raise DataError(
                f"{path}: line {number}: {reason}. Remedy: a line per group: name, description, "
                "genes, with tabs between."
            )
        found[name] = [gene for gene in rest[1:] if gene]
    return found


class Sets:
    """Perturbations as arrays, to ask of each cell which of them it has.

    tokens: int32 per perturbation, its genes
    """

    def __init__(self, perturbations: Sequence[Perturbation], vocabulary_size: int) -> None:
        self.tokens = [np.array(each.tokens, np.int32) for each in perturbations]
        lengths = [len(genes) for genes in self.tokens]
        self._flat = np.concatenate([np.empty(0, np.int32), *self.tokens])
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self._is_in = np.zeros(vocabulary_size, bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def in_sentence(self, tokens_T: np.ndarray) -> np.ndarray:
        """bool per perturbation: whether one of its genes, at least, stands in the sentence."""
        self._is_in[tokens_T] = True
        found = np.logical_or.reduceat(self._is_in[self._flat], self._starts)
        self._is_in[tokens_T] = False
        return found


ALL_GENES = -1


@dataclass(frozen=True)
class Question:
    """What is perturbed, in which cells, and what is asked of it.

    genes:      ids or symbols, each a perturbation;  groups: a file, or {name: genes}
    top:        so many of the genes in most cells, each a perturbation; ALL_GENES: all of them
    mode:       delete or overexpress;  truncated: delete from the sentence as it was cut
    start:      COLUMN=VALUE, the cells that are perturbed; "": all, but for those of the goal
    goal:       COLUMN=VALUE, the cells toward whose mean vector shifts are measured; "": none
    max_cells:  at most so many of either, drawn by `seed`; 0: all
    null:       random controls to compare each perturbation with, drawn by `seed`; 0: no p
    moved:      how many of the most moved genes are kept of each perturbation; 0: none
    """

    genes: Sequence[str] = ()
    groups: Path | Mapping[str, Sequence[str]] | None = None
    top: int | None = None
    mode: str = Mode.delete.value
    truncated: bool = False
    start: str = ""
    goal: str = ""
    max_cells: int = 0
    null: int = 100
    moved: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for what cannot be asked, or not together."""
        if self.mode not in {mode.value for mode in Mode}:
            raise ConfigError(f"mode must be delete or overexpress, and is {self.mode}.")
        if self.truncated and self.mode != Mode.delete.value:
            raise ConfigError(
                '`truncated=True` goes with `mode="delete"`: what is put in front of a sentence '
                "that was cut is the same as of a whole one."
            )
        if not self.genes and self.groups is None and self.top is None:
            raise ConfigError(
                "nothing is to be perturbed: give `genes=`, `groups=` or `top=N` (`top=-1`: every "
                "gene)."
            )
        for name in ("max_cells", "null", "moved", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}=` must be at least 0, and is {getattr(self, name)}.")
        if self.top is not None and self.top != ALL_GENES and self.top < 1:
            raise ConfigError(f"`top=` must be at least 1, and is {self.top}.")

    def perturbations(self, names: GeneNames) -> tuple[list[Perturbation], list[str]]:
        """Its genes and groups, and lines on what was left out. DataError for unknown ones."""
        asked, twice = names.singles(self.genes)
        if self.groups is None:
            return asked, twice
        groups = self.groups
        named = read_groups(groups) if isinstance(groups, Path) else groups
        found, lines = names.groups(named)
        return asked + found, twice + lines

    def facts(self) -> dict[str, Any]:
        """What goes into uns: plain text and numbers."""
        names = ("mode", "truncated", "start", "goal", "max_cells", "null", "seed")
        return {name: getattr(self, name) for name in names}
