"""Question of a perturbation: genes, cells and controls.

options  ->  Question, checked
ENSG... | symbol, of the file or the vocabulary  ->  token   ->  Perturbation of one gene
groups: a.json {name: [genes]} | a.gmt           ->  tokens  ->  Perturbation of several at once
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.io.schema import as_type, parse_json, read_text
from geneformer_mcore.perturbation.perturbed_cells import Mode
from geneformer_mcore.tokenizer.gencode import clean_id
from geneformer_mcore.tokenizer.genes import names_as_symbols
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS

ALL_GENES = -1
MOST_LISTED = 10


@dataclass(frozen=True)
class Question:
    """Perturbations, cells and controls.

    genes:      ids or symbols, each a perturbation;  groups: a file, or {name: genes}
    top:        number of genes in most cells, each a perturbation; ALL_GENES: all of them
    mode:       delete or overexpress;  truncated: delete without ranking the counts again
    start:      COLUMN=VALUE, the cells to perturb; "": all but those of the goal
    goal:       COLUMN=VALUE, cells whose mean vector shifts are measured toward; "": none
    max_cells:  most cells of either, drawn by `seed`; 0: all
    null:       random controls per perturbation, drawn by `seed`; 0: no p
    moved:      most moved genes to list per perturbation; 0: none
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
        """Raise ConfigError for values out of range, or that exclude each other."""
        if self.mode not in {mode.value for mode in Mode}:
            raise ConfigError(f"mode must be delete or overexpress, and is {self.mode}.")
        if self.truncated and self.mode != Mode.delete.value:
            raise ConfigError(
                '`truncated=True` goes with `mode="delete"`: what is put in front of a sentence '
                "that was cut is the same as of a whole one."
            )
        if not self.genes and self.groups is None and self.top is None:
            raise ConfigError(
                "nothing is to be perturbed: give `genes=`, `groups=`, `top=N` or, for every gene, "
                "`top=-1`."
            )
        for name in ("max_cells", "null", "moved", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}=` must be at least 0, and is {getattr(self, name)}.")
        if self.top is not None and self.top != ALL_GENES and self.top < 1:
            raise ConfigError(f"`top=` must be at least 1, and is {self.top}.")

    def perturbations(self, names: GeneNames) -> tuple[list[Perturbation], list[str]]:
        """(perturbations of genes and groups, notes on skipped names). DataError for unknown
        ones."""
        asked, lines = names.singles(self.genes)
        if self.groups is None:
            return asked, lines
        groups = read_groups(self.groups) if isinstance(self.groups, Path) else self.groups
        found, more = names.groups(groups)
        return asked + found, lines + more

    def facts(self) -> dict[str, Any]:
        """Content of uns: plain text and numbers."""
        names = ("mode", "truncated", "start", "goal", "max_cells", "null", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Perturbation:
    """Genes that are deleted, or ranked first, at once.

    name:    the gene's symbol if known, else its id; or the name of the group
    tokens:  of its genes, in the given order, each once
    """

    name: str
    tokens: tuple[int, ...]


def effect_key(tokens: tuple[int, ...], mode: Mode) -> tuple[int, ...]:
    """Equal for perturbations with equal effects: the order of genes matters in overexpression
    only."""
    return tokens if mode is Mode.overexpress else tuple(sorted(tokens))


class GeneNames:
    """Names of the model's genes.

    Ids of the vocabulary come first, then the symbols of the file, of a table, of the vocabulary.
    A symbol of several genes is ignored.
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
        """Names for a file; table: {symbol: id} of the user."""
        found: dict[str, int] = {}
        several = set()
        tokens = cells.genes.token_of_column.tolist()
        for name, token in zip(cells.counts.gene_names(), tokens, strict=True):
            if token and found.setdefault(name, token) != token:
                several.add(name)
        return cls(vocabulary, {n: t for n, t in found.items() if n not in several}, table)

    def token(self, name: str) -> int:
        """The token of a gene, 0 if unknown."""
        return self._tokens.get(name) or self._tokens.get(clean_id(name), 0)

    def symbol(self, token: int) -> str:
        """The symbol of the gene, else its id."""
        return self._symbols.get(token, self.id_of(token))

    def id_of(self, token: int) -> str:
        """The id of the gene."""
        return self._vocabulary.feature_ids[token - NUM_SPECIALS]

    def single(self, token: int) -> Perturbation:
        """The gene alone."""
        return Perturbation(self.symbol(token), (token,))

    def singles(self, names: Iterable[str]) -> tuple[list[Perturbation], list[str]]:
        """(a perturbation per gene, notes on genes that are named twice). Raises DataError that
        lists unknown names."""
        tokens = {name: self.token(name) for name in names if name}
        self._refuse_unknown([name for name, token in tokens.items() if not token], len(tokens))
        first: dict[int, str] = {}
        lines = [
            f"{name}: the same gene as {first[token]}, perturbed once"
            for name, token in tokens.items()
            if first.setdefault(token, name) != name
        ]
        return [self.single(token) for token in first], lines

    def groups(self, named: Mapping[str, Sequence[str]]) -> tuple[list[Perturbation], list[str]]:
        """(a perturbation per group, notes on groups with unknown genes). Raises DataError for a
        group without a known gene."""
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
    """(perturbations with distinct effects and names, notes on those of another name that are
    skipped)."""
    found: dict[tuple[int, ...], Perturbation] = {}
    taken: set[str] = set()
    lines = []
    for perturbation in asked:
        key = effect_key(perturbation.tokens, mode)
        if key in found:
            if perturbation.name != found[key].name:
                lines.append(f"{perturbation.name}: the same genes as {found[key].name}: left out")
            continue
        name, number = perturbation.name, 1
        while name in taken:
            number += 1
            name = f"{perturbation.name} ({number})"
        taken.add(name)
        found[key] = replace(perturbation, name=name)
    return list(found.values()), lines


def read_groups(path: Path) -> dict[str, list[str]]:
    """{group: genes} of a JSON file, or of a GMT file (name, description, genes, between tabs),
    either of which may be gzipped. Raises DataError where it cannot be read, is neither, or has no
    group."""
    text = read_text(path)
    is_json = text.lstrip()[:1] == "{" or ".json" in path.suffixes
    found = _of_json(text, path) if is_json else _of_gmt(text, path)
    problems = [
        f"group {name} has no gene" if name.strip() else "a group has no name"
        for name, genes in found.items()
        if not genes or not name.strip()
    ]
    if problems or not found:
        what = problems[0] if problems else "there is no group"
        raise DataError(f"{path}: {what}. Remedy: {_KINDS}.")
    return found


_KINDS = (
    'JSON {"group": ["gene", ...]}, or lines of name, description and genes with tabs between'
    " (.gmt)"
)


def _of_json(text: str, path: Path) -> dict[str, list[str]]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}. Remedy: {_KINDS}.") from error
    return as_type(content, dict[str, list[str]], path, _KINDS)


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
    """Perturbations as arrays. tokens: int32 per perturbation, its genes."""

    def __init__(self, perturbations: Sequence[Perturbation], vocabulary_size: int) -> None:
        self.tokens = [np.array(each.tokens, np.int32) for each in perturbations]
        self._flat = np.concatenate([np.empty(0, np.int32), *self.tokens])
        self._starts = np.cumsum([0, *map(len, self.tokens)], dtype=np.int64)[:-1]
        self._is_in = np.zeros(vocabulary_size, bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def in_sentence(self, tokens_T: np.ndarray) -> np.ndarray:
        """bool per perturbation: at least one of its genes is among the cell's tokens."""
        self._is_in[tokens_T] = True
        found = np.logical_or.reduceat(self._is_in[self._flat], self._starts)
        self._is_in[tokens_T] = False
        return found
