"""Cells and genes as vectors: what launch/embed.py does.

checkpoint + cells  ->  Encoder  ->  vectors in the order of the cells  ->  file
checkpoint          ->  its word embedding                              ->  table of genes
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.config.sections import Pooling, Precision
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import encoder, pretrained
from geneformer_mcore.inference.cells import Cells, open_cells
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.anndata_out import Beside
from geneformer_mcore.io.files import check_output, whole_file
from geneformer_mcore.io.progress import ProgressLine, no_progress
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS
from geneformer_mcore.version import __version__

# Embeddings as files: of cells as AnnData or .npy, of genes as a table.
#
# float32 [cells, H]  ->  float32 | float16 | bfloat16  ->  obsm["X_geneformer"] | b.npy + b.json
# float32 [genes, H]  ->  rows with id and name         ->  .csv | .tsv | .npy + .json
#
# numpy has no bfloat16: such numbers are kept as float32 whose lower 16 bits are 0, which every
# tool reads as the numbers they are.

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
            f'{most:,.0f}. Remedy: `dtype="float32"` or bfloat16, or `layer="last"`.'
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
        anndata_out.write_copy(cells.path, path, beside(values_NH, facts))
    else:
        anndata_out.write_new(cells.obs(), path, beside(values_NH, facts))


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


@dataclass(frozen=True)
class Choices:
    """How cells become vectors.

    layer:             last (after the final norm), second-to-last, or how many layers (0: none)
    pooling:           mean over genes, or cls
    precision:         of the arithmetic: fp32, bf16, fp16; "" takes what suits the device
    dtype:             of the result: float32, float16 or bfloat16 (see embedding_files)
    tokens_per_batch:  at most; 0 takes what suits the device
    """

    layer: str = "last"
    pooling: str = "mean"
    precision: str = ""
    dtype: str = "float32"
    tokens_per_batch: int = 0


@dataclass(frozen=True)
class EmbedRequest:
    """What launch/embed.py was asked for; `source` and `output` come together."""

    checkpoint: Path
    source: str = ""
    output: Path | None = None
    gene_embeddings: Path | None = None
    choices: Choices = field(default_factory=Choices)
    vocabulary: Path | None = None
    options: InputOptions = field(default_factory=InputOptions)
    layout: Sequence[str] = ()
    overwrite: bool = False


def run(request: EmbedRequest, is_first: bool) -> list[str]:
    """Embeds what was asked for, on the ranks that are here, and writes it from the first one.

    Returns lines that say what was written, on the first rank. Raises a GeneformerError for all
    that the user can mend, the output's place before any work.
    """
    _check(request)
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    lines = list(model.messages)
    if request.gene_embeddings is not None and is_first:
        lines.append(_embed_genes(model, request.gene_embeddings))
    if request.output is None:
        return lines
    choices, started_s = request.choices, time.monotonic()
    seq_length = model.config.data.seq_length
    with ExitStack() as stack:
        cells = open_cells(request.source, model.vocabulary, seq_length, request.options)
        stack.callback(cells.close)
        values_NH, facts = embed_cells(model, cells, choices, is_first)
        if values_NH is None:
            return lines
        write_cells(request.output, cells, values_NH, facts)
    found, seconds = is_embedded(values_NH), time.monotonic() - started_s
    missing = int((~found).sum())
    lines.append(
        f"{request.output}: {len(found):,} cells x {values_NH.shape[1]} ({choices.dtype}), "
        f"{missing:,} without a known gene (NaN), {choices.pooling} of layer {choices.layer}, "
        f"{facts['precision']}, {seconds:.1f} s, {len(found) / seconds:,.0f} cells/s"
    )
    return lines


def _check(request: EmbedRequest) -> None:
    if (request.output is None) != (not request.source):
        raise ConfigError("--input and --output go together: cells, and where their vectors go.")
    if request.output is None and request.gene_embeddings is None:
        raise ConfigError("nothing is asked for: give --input and --output, or --gene-embeddings.")
    overwrite = request.overwrite
    if request.gene_embeddings is not None:
        check_target(request.gene_embeddings, TABLES, overwrite)
    if request.output is None:
        return
    if request.output.exists() and Path(request.source).resolve() == request.output.resolve():
        raise ConfigError(
            f"{request.output}: the output must be another file than the input, which is never "
            "changed. Remedy: name another --output."
        )
    check_target(request.output, OUTPUTS, overwrite)


def _embed_genes(model: Pretrained, path: Path) -> str:
    rows = weights_reader.read_tensor(model.folder, weights_reader.WORD_EMBEDDING)
    values_GH = rows[NUM_SPECIALS : model.vocabulary.size].numpy()
    write_genes(path, values_GH, model.vocabulary, facts_of(model))
    return f"{path}: {len(values_GH):,} genes x {values_GH.shape[1]}"


def embed_cells(
    model: Pretrained, cells: Cells, choices: Choices, shows_progress: bool
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """(vectors of all cells, on rank 0, in the dtype asked for; what they are). Raises ConfigError
    for choices that there are not."""
    pooling, precision = checked(choices)
    layers = encoder.number_of_layer(choices.layer, model.config.model.num_layers)
    with ExitStack() as stack:
        engine = stack.enter_context(
            encoder.started(model, precision, choices.tokens_per_batch, layers)
        )
        line = stack.enter_context(ProgressLine("cells")) if shows_progress else None
        work = encoder.embedding(engine, pooling)
        progress = line.update if line else no_progress
        found = encoder.per_cell(engine, cells, work, np.float32, progress)
        facts = facts_of_states(engine, choices, layers)
    if found is None:
        return None, facts
    return as_dtype(found, choices.dtype), facts


def checked(choices: Choices) -> tuple[Pooling, Precision | None]:
    """What they name. Raises ConfigError for a name that there is not."""
    precisions = ("fp32", "bf16", "fp16")
    for name, value, allowed in (
        ("pooling", choices.pooling, tuple(each.value for each in Pooling)),
        ("precision", choices.precision, ("", *precisions)),
        ("dtype", choices.dtype, DTYPES),
    ):
        if value not in allowed:
            wanted = ", ".join(filter(None, allowed))
            raise ConfigError(f"{name} must be one of {wanted}, and is {value}.")
    return Pooling(choices.pooling), Precision(choices.precision) if choices.precision else None


def facts_of_states(engine: Encoder, choices: Choices, layers: int | None) -> dict[str, Any]:
    """What goes into uns: plain text and numbers, which h5ad can hold."""
    model = engine.pretrained
    num_layers = model.config.model.num_layers
    return facts_of(model) | {
        "layer": choices.layer,
        "layer_number": num_layers if layers is None else layers,
        "final_norm": layers is None,
        "pooling": choices.pooling,
        "precision": engine.precision.value,
        "dtype": choices.dtype,
    }


def facts_of(model: Pretrained) -> dict[str, Any]:
    """Which model it is, in plain text and numbers."""
    config = model.config
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    return {
        "model": {name: getattr(config.model, name) for name in sizes}
        | {
            "activation": config.model.activation.value,
            "seq_length": config.data.seq_length,
            "vocabulary_size": model.vocabulary.size,
        },
        "checkpoint": model.folder.name,
        "checkpoint_hash": model.sha256,
        "step": model.record.step,
        "cells_seen": model.record.cells_seen,
        "vocabulary_hash": model.vocabulary.checksum,
        "version": __version__,
    }


def embed_adata(
    adata: Any,
    checkpoint: str | Path,
    choices: Choices,
    vocabulary: str | Path | None,
    counts_layer: str | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The same for an AnnData in memory, in this process alone."""
    model = pretrained.find(checkpoint, vocabulary)
    with ExitStack() as stack:
        options = InputOptions(layer=counts_layer)
        cells = open_cells(adata, model.vocabulary, model.config.data.seq_length, options)
        stack.callback(cells.close)
        values_NH, facts = embed_cells(model, cells, choices, shows_progress=True)
    if values_NH is None:
        raise ConfigError(
            "geneformer_mcore.embed works in one process, and this is one of several. Remedy: "
            "torchrun launch/embed.py."
        )
    return values_NH, facts
