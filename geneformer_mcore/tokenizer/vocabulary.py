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
        content = _read_json(Path(path))
        vocabulary = _from_content(content, Path(path))
        found, computed = content["checksum"], vocabulary.checksum
        if found != computed:
            raise DataError(
                f"{path}: the checksum in the file is {str(found)[:12]}..., that of its content "
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


def _problem_of_medians(ids: tuple[str, ...], medians: tuple[float, ...]) -> str | None:
    wrong = [i for i, m in enumerate(medians) if not isinstance(m, float) or not 0 < m < math.inf]
    if not wrong:
        return None
    return (
        f"medians must be finite and above 0: {len(wrong)} are not, the first {medians[wrong[0]]!r}"
        f" of gene {ids[wrong[0]]}. Remedy: leave genes out that no cell expresses."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file. Remedy: make a vocabulary with "
            "data_prep/build_vocabulary.py or data_prep/import_dictionary.py."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable vocabulary (JSON): {error}.") from error
    wanted = {"schema_version", "specials", "feature_ids", "names", "medians", "checksum"}
    missing = wanted - set(content) if isinstance(content, dict) else wanted
    if missing:
        raise DataError(
            f"{path}: not a vocabulary, {', '.join(sorted(missing))} missing. Remedy: import "
            "Geneformer's {id: median} dictionaries with data_prep/import_dictionary.py."
        )
    strange = set(content) - wanted - {"origin"}
    if strange:
        raise DataError(
            f"{path}: damaged, or of a later version: {', '.join(sorted(strange))} are no parts of "
            "a vocabulary. Remedy: write it again with this version."
        )
    return content


def _origin_of(content: dict[str, Any], path: Path) -> dict[str, Any] | None:
    origin = content.get("origin")
    if origin is None:
        return None
    if not isinstance(origin, dict) or origin.pop("checksum", None) != _checksum(origin):
        raise DataError(
            f"{path}: the record of its origin does not fit its checksum: it was changed or "
            "damaged after it was written. Remedy: write it again with build_vocabulary.py."
        )
    return origin


def _from_content(content: dict[str, Any], path: Path) -> Vocabulary:
    if content["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{path}: vocabulary schema {content['schema_version']!r}, this version reads "
            f"{SCHEMA_VERSION}. Remedy: write it again with this version."
        )
    if content["specials"] != list(SPECIAL_TOKENS):
        raise DataError(
            f"{path}: special tokens {content['specials']}, ours are {list(SPECIAL_TOKENS)}: token "
            "ids would shift. Remedy: write it again with import_dictionary.py."
        )
    columns = [content[name] for name in ("feature_ids", "names", "medians")]
    if not all(isinstance(column, list) for column in columns):
        raise DataError(f"{path}: feature_ids, names and medians must be lists.")
    try:
        ids, names, medians = (tuple(column) for column in columns)
        return Vocabulary(ids, names, medians, _origin_of(content, path))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
