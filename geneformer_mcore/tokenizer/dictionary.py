"""Geneformer's published dictionaries, read without running what a pickle may hold.

    medians.json | medians.pkl  [+ tokens.pkl | tokens.json]  ->  Vocabulary

A pickle is a program: loading one executes it. Here only containers, text, numbers and numpy
scalars are rebuilt, the latter from their bytes by code of ours; anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.schema import parse_json, read_bytes
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import SPECIAL_TOKENS

PUBLISHED_SPECIALS = frozenset(
    {"<pad>", "<mask>", "<cls>", "<eos>", "<sep>", "<unk>", *SPECIAL_TOKENS}
)
"""Keys of published token dictionaries that are no genes."""


class _NumberType:
    """Stands for numpy.dtype in a pickle: a kind of plain number and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_flags: object) -> None:
        if code not in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}:
            raise pickle.UnpicklingError(f"numpy type {code!r} is no plain number")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _scalar(number_type: _NumberType, raw: bytes) -> float | int | bool:
    if not isinstance(number_type, _NumberType) or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is no plain number")
    dtype = np.dtype(number_type.order + number_type.code)
    if len(raw) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a numpy scalar of {len(raw)} bytes, not {dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    # Old pickle protocols write the bytes of a numpy scalar as latin-1 text.
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _NumberType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
}


class _PlainUnpickler(pickle.Unpickler):
    """Rebuilds plain containers, text and numbers; the name of anything else is refused."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_dictionary(path: str | Path) -> dict[str, Any]:
    """The dictionary in a JSON file or a pickle of plain values (recognised by the content).

    Raises DataError for anything that is not a dictionary of text keys, and for a pickle that asks
    for any class or function.
    """
    return parse_dictionary(read_bytes(path), path)


def parse_dictionary(raw: bytes, path: str | Path) -> dict[str, Any]:
    """The same of a file's content, unzipped."""
    is_json = raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
    content = _parse_json(raw, path) if is_json else _parse_pickle(raw, path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{path}: must hold a dictionary whose keys are gene ids.")
    return content


def _parse_json(raw: bytes, path: str | Path) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}. Remedy: save it again.") from error


def _parse_pickle(raw: bytes, path: str | Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(raw)).load()
    # A damaged pickle can raise nearly anything; a hostile one must end here too.
    except Exception as error:
        raise DataError(
            f"{path}: refused as a pickle: {error}. Only dictionaries of text and numbers are "
            "read. Remedy: where you trust its source, write it as JSON, {gene id: number}."
        ) from error


def import_dictionary(
    medians_path: str | Path,
    tokens_path: str | Path | None = None,
    names: dict[str, str] | None = None,
) -> Vocabulary:
    """A vocabulary from Geneformer's {gene id: median} and, where given, {gene id: token id}.

    Genes without a token are left out. Tokens must follow the sorted gene ids, so that the
    published ids differ from ours by a constant.
    """
    medians = _check_medians(read_dictionary(medians_path), medians_path)
    if tokens_path is not None:
        genes = _genes_in_token_order(read_dictionary(tokens_path), tokens_path)
        missing = [gene for gene in genes if gene not in medians]
        if missing:
            raise DataError(
                f"{tokens_path}: {len(missing)} of {len(genes)} genes have no median in "
                f"{medians_path}, the first {missing[0]}. Remedy: give two files of one release."
            )
        medians = {gene: medians[gene] for gene in genes}
    return Vocabulary.from_medians(medians, names)


def _check_medians(content: dict[str, Any], path: str | Path) -> dict[str, float]:
    for gene, median in content.items():
        if isinstance(median, bool) or not isinstance(median, int | float):
            raise DataError(f"{path}: the median of {gene} must be a number, not {median!r}.")
        if isinstance(median, int) and abs(median) > sys.float_info.max:
            # Not shown: Python refuses to print whole numbers of some length.
            raise DataError(
                f"{path}: the median of {gene} is a whole number of {median.bit_length():,} bits, "
                f"and must be below {sys.float_info.max:.3g}. Remedy: correct it, or leave it out."
            )
    return {gene: float(median) for gene, median in content.items()}


def _genes_in_token_order(content: dict[str, Any], path: str | Path) -> list[str]:
    genes = {gene: token for gene, token in content.items() if gene not in PUBLISHED_SPECIALS}
    if not all(isinstance(token, int) and 0 <= token < 2**63 for token in genes.values()):
        raise DataError(f"{path}: token ids must be whole numbers from 0 to 2^63 - 1.")
    ordered = sorted(genes, key=lambda gene: genes[gene])
    if ordered != sorted(genes):
        pairs = zip(ordered, sorted(genes), strict=True)
        found, due = next(pair for pair in pairs if pair[0] != pair[1])
        raise DataError(
            f"{path}: tokens must follow the sorted gene ids; token {genes[found]} is "
            f"{found}, where {due} was due. Remedy: leave `tokens=` out to "
            "number the genes again (weights trained with that dictionary will then not fit)."
        )
    return ordered
