"""The genes a model knows, in token order, with the median that normalises each.

    {id: median}  ->  Vocabulary  ->  vocabulary.json (with its checksum)  ->  Vocabulary

A gene's token id is its place in the sorted gene ids plus the number of special tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.schema import as_type, read_json
from geneformer_mcore.types import NUM_SPECIALS, SPECIAL_TOKENS

SCHEMA_VERSION = 1
MAX_TOKENS = 65_535
"""Tokens are stored as uint16."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Genes in token order. Two vocabularies are equal when their checksums are.

    feature_ids:  unique gene ids (Ensembl ids for human corpora), sorted
    names:        one name (symbol) per gene, for people; the id itself where none is known
    medians:      one per gene, > 0: the median over a corpus' non-zero count / total * 10,000
    origin:       how the medians were made, where known (plain JSON, see tally.Tally); no part of
                  equality

    Raises DataError where one of these does not hold.
    """

    feature_ids: tuple[str, ...]
    names: tuple[str, ...]
    medians: tuple[float, ...]
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for problem in (
            _problem_of_lengths(self),
            _problem_of_ids(self.feature_ids),
            _problem_of_names(self.feature_ids, self.names),
            _problem_of_medians(self.feature_ids, self.medians),
        ):
            if problem:
                raise DataError(f"vocabulary: {problem}")

    @classmethod
    def from_medians(
        cls,
        medians: Mapping[str, float],
        names: Mapping[str, str] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> Vocabulary:
        """The vocabulary of {gene id: median}; `names` is {gene id: symbol}, where known."""
        ids = tuple(sorted(medians))
        known = names or {}
        return cls(
            ids,
            tuple(known.get(gene, gene) for gene in ids),
            tuple(float(medians[gene]) for gene in ids),
            origin,
        )

    @property
    def size(self) -> int:
        """Tokens, specials included: the smallest number above every token id."""
        return len(self.feature_ids) + NUM_SPECIALS

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """{gene id: token id}."""
        return {gene: place + NUM_SPECIALS for place, gene in enumerate(self.feature_ids)}

    @cached_property
    def medians_of_token(self) -> np.ndarray:
        """float64 [size], the median by token id; 1 for the specials, which are never ranked."""
        return np.concatenate([np.ones(NUM_SPECIALS), np.array(self.medians, dtype=np.float64)])

    @cached_property
    def checksum(self) -> str:
        """SHA-256, as hex, of genes, names and medians in their canonical JSON form."""
        return _checksum(self._content())

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all. Raises DataError if it cannot be written."""
        content = self._content() | {"checksum": self.checksum}
        if self.origin is not None:
            content["origin"] = {**self.origin, "checksum": _checksum(self.origin)}
        text = json.dumps(content, indent=0)
        with whole_file(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    def is_saved(self, path: str | Path) -> bool:
        """Whether `path` holds this vocabulary."""
        try:
            return Vocabulary.load(path) == self
        except DataError:
            return False

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads what `save` wrote. Raises DataError unless it is whole and its checksum holds."""
        content = _read(Path(path))
        vocabulary = _from_content(content, Path(path))
        found, computed = content.checksum, vocabulary.checksum
        if found != computed:
            raise DataError(
                f"{path}: the checksum in the file is {found[:12]}..., that of its content "
                f"{computed[:12]}...: it was changed or damaged after it was written. Remedy: "
                "write it again with build_vocabulary.py or import_dictionary.py."
            )
        return vocabulary

    def _content(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "specials": list(SPECIAL_TOKENS),
            "feature_ids": list(self.feature_ids),
            "names": list(self.names),
            "medians": list(self.medians),
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.feature_ids):,} genes, {self.checksum[:12]})"


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _problem_of_lengths(vocabulary: Vocabulary) -> str | None:
    columns = vocabulary.feature_ids, vocabulary.names, vocabulary.medians
    numbers = [*map(len, columns)]
    if len(set(numbers)) > 1:
        return "gene ids, names and medians must be as many: {} ids, {} names, {} medians.".format(
            *numbers
        )
    if numbers[0] == 0:
        return "there is no gene. Remedy: give cells with counts, or a dictionary with genes."
    if vocabulary.size > MAX_TOKENS:
        return (
            f"{vocabulary.size:,} tokens, and at most {MAX_TOKENS:,} fit uint16 token ids. "
            "Remedy: keep fewer genes, protein-coding ones for instance."
        )
    return None


def _problem_of_ids(ids: tuple[str, ...]) -> str | None:
    for i, gene in enumerate(ids):
        if not isinstance(gene, str) or not gene:
            return f"gene ids must be text and not blank: place {i} holds {gene!r}."
        if i and ids[i - 1] >= gene:
            return (
                f"gene ids must be unique and sorted: place {i} holds {gene!r} "
                f"after {ids[i - 1]!r}."
            )
    return None


def _problem_of_names(ids: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    for gene, name in zip(ids, names, strict=False):
        if not isinstance(name, str):
            return f"names must be text: gene {gene} is called {name!r}."
    return None


def _problem_of_medians(ids: tuple[str, ...], medians: tuple[float, ...]) -> str | None:
    wrong = [i for i, m in enumerate(medians) if not isinstance(m, float) or not 0 < m < math.inf]
    if not wrong:
        return None
    return (
        f"medians must be finite and above 0: {len(wrong)} are not, the first {medians[wrong[0]]!r}"
        f" of gene {ids[wrong[0]]}. Remedy: leave genes out that no cell expresses."
    )


@dataclass(frozen=True)
class _File:
    """vocabulary.json. checksum: of all but the origin, which has its own."""

    schema_version: int
    specials: list[str]
    feature_ids: tuple[str, ...]
    names: tuple[str, ...]
    medians: tuple[float, ...]
    checksum: str
    origin: dict[str, Any] | None = None


_WRITE_AGAIN = (
    "write it again with this version; Geneformer's {id: median} dictionaries become vocabularies "
    "by data_prep/import_dictionary.py"
)


def _read(path: Path) -> _File:
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file. Remedy: make a vocabulary with "
            "data_prep/build_vocabulary.py or data_prep/import_dictionary.py."
        )
    content = read_json(path, _WRITE_AGAIN)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in (None, SCHEMA_VERSION):
        raise DataError(
            f"{path}: vocabulary schema {version!r}, this version reads {SCHEMA_VERSION}. Remedy: "
            "write it again with this version."
        )
    return as_type(content, _File, path, _WRITE_AGAIN)


def _origin_of(content: _File, path: Path) -> dict[str, Any] | None:
    origin = content.origin
    if origin is not None and origin.pop("checksum", None) != _checksum(origin):
        raise DataError(
            f"{path}: the record of its origin does not fit its checksum: it was changed or "
            "damaged after it was written. Remedy: write it again with build_vocabulary.py."
        )
    return origin


def _from_content(content: _File, path: Path) -> Vocabulary:
    if content.specials != list(SPECIAL_TOKENS):
        raise DataError(
            f"{path}: special tokens {content.specials}, ours are {list(SPECIAL_TOKENS)}: token "
            "ids would shift. Remedy: write it again with import_dictionary.py."
        )
    origin = _origin_of(content, path)
    try:
        return Vocabulary(content.feature_ids, content.names, content.medians, origin)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
