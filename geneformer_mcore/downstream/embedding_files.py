"""Embeddings as files: of cells as AnnData or .npy, of genes as a table.

float32 [cells, H]  ->  float32 | float16 | bfloat16  ->  obsm["X_geneformer"] | b.npy + b.json
float32 [genes, H]  ->  rows with id and name         ->  .csv | .tsv | .npy + .json

numpy has no bfloat16: such numbers are kept as float32 whose lower 16 bits are 0, which every tool
reads as the numbers they are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.cells import annotated
from geneformer_mcore.cells.annotated import Beside
from geneformer_mcore.cells.output import check_output, whole_file
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.downstream.cells import Cells
from geneformer_mcore.errors import ConfigError, DataError

KEY = "X_geneformer"
FLAG = "geneformer_embedded"
FACTS = "geneformer"
"""Names in obsm, obs and uns."""
DTYPES = ("float32", "float16", "bfloat16")
OUTPUTS, TABLES = (".h5ad", ".npy"), (".csv", ".tsv", ".npy")


def check_target(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raises ConfigError for a file of another kind, DataError where it cannot be written."""
    if path.suffix not in suffixes:
        raise ConfigError(
            f"{path}: the output must end in {' or '.join(suffixes)}, which says what it is, and "
            f"ends in {path.suffix or 'nothing'}."
        )
    check_output(path, overwrite)
    if path.suffix == ".npy":
        check_output(path.with_suffix(".json"), overwrite)


def as_dtype(values_NH: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [N, H] in one of DTYPES; NaN rows stay. Raises DataError where float16 has no such
    large numbers, ConfigError for another dtype."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, and is {dtype}.")
    if dtype == "float32":
        return values_NH
    if dtype == "bfloat16":
        return torch.from_numpy(values_NH).bfloat16().float().numpy()
    most = float(np.nanmax(np.abs(values_NH), initial=0.0))
    if most > np.finfo(np.float16).max:
        raise DataError(
            f"float16 holds numbers up to {np.finfo(np.float16).max:,.0f}, and the embedding has "
            f"{most:,.0f}. Remedy: --dtype float32 or bfloat16, or --layer last."
        )
    return values_NH.astype(np.float16)


def is_embedded(values_NH: np.ndarray) -> np.ndarray:
    """bool [N], False for cells without a known gene."""
    return ~np.isnan(values_NH).any(axis=1)


def beside(values_NH: np.ndarray, facts: Mapping[str, Any], key: str = KEY) -> Beside:
    """What is put beside the cells of an AnnData."""
    return Beside({key: values_NH}, {FLAG: is_embedded(values_NH)}, {FACTS: dict(facts)})


def write_cells(path: Path, cells: Cells, values_NH: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Writes the embedding of `cells` to `path`: into a copy of their h5ad file, or into an AnnData
    of their obs where they are of none, or as .npy with what it is beside it."""
    if path.suffix == ".npy":
        _write_array(path, values_NH, {**facts, "cells": len(values_NH)})
    elif cells.path is not None:
        annotated.write_copy(cells.path, path, beside(values_NH, facts))
    else:
        annotated.write_new(cells.obs(), path, beside(values_NH, facts))


def write_genes(
    path: Path, values_GH: np.ndarray, vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Writes a vector per gene of the vocabulary, in its order, with id and name."""
    ids, names = vocabulary.feature_ids, vocabulary.names
    if path.suffix == ".npy":
        content = {**facts, "feature_ids": list(ids), "names": list(names)}
        _write_array(path, values_GH, content)
        return
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["feature_id", "name", *range(values_GH.shape[1])])
        for gene, name, vector in zip(ids, names, values_GH, strict=True):
            # float32's own shortest form: reading it back gives the same number.
            writer.writerow([gene, name, *(str(number) for number in vector)])


def _write_array(path: Path, values: np.ndarray, content: Mapping[str, Any]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    with whole_file(path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(dict(content), indent=1) + "\n")
