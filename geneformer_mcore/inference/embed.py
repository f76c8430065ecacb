"""Cells and genes as vectors: `geneformer_mcore.embed` and launch/embed.py.

checkpoint + cells  ->  Encoder  ->  float32 [cells, H], in the order of the cells
    ->  float32 | float16 | bfloat16  ->  obsm["X_geneformer"] | b.npy + b.json
checkpoint  ->  its word embedding  ->  float32 [genes, H]  ->  .csv | .tsv | .npy + .json
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.config.sections import Pooling, Precision
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import encoder, pretrained
from geneformer_mcore.inference.cells import Cells, coverage_lines, facts_of_cells, open_cells
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.anndata_out import Beside
from geneformer_mcore.io.files import check_output, together, whole_file, write_json
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS
from geneformer_mcore.version import __version__

KEY, FLAG, FACTS = "X_geneformer", "geneformer_embedded", "geneformer"
"""Names in obsm, obs and uns."""
PRECISIONS, DTYPES = ("fp32", "bf16", "fp16"), ("float32", "float16", "bfloat16")
OUTPUTS, TABLES = (".h5ad", ".npy"), (".csv", ".tsv", ".npy")


@dataclass(frozen=True)
class Choices:
    """How cells become vectors.

    layer:             last (after the final norm), second-to-last, or how many layers (0: none)
    pooling:           mean over genes, or cls
    precision:         of the arithmetic: fp32, bf16, fp16; "" takes what suits the device
    dtype:             of the result: float32, float16 or bfloat16
    tokens_per_batch:  at most; 0 takes what suits the device
    """

    layer: str = "last"
    pooling: str = "mean"
    precision: str = ""
    dtype: str = "float32"
    tokens_per_batch: int = 0

    def check(self) -> tuple[Pooling, Precision | None]:
        """Pooling and precision by name. Raises ConfigError for a name that does not exist."""
        for name, value, allowed in (
            ("pooling", self.pooling, tuple(each.value for each in Pooling)),
            ("precision", self.precision, ("", *PRECISIONS)),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                wanted = ", ".join(filter(None, allowed))
                raise ConfigError(f"{name} must be one of {wanted}, and is {value}.")
        return Pooling(self.pooling), Precision(self.precision) if self.precision else None


def embed_adata(
    adata: Any,
    checkpoint: str | Path,
    choices: Choices,
    vocabulary: str | Path | None,
    counts_layer: str | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """`embed_cells` for an AnnData in memory, in this process alone."""
    model = pretrained.find(checkpoint, vocabulary)
    options, seq_length = InputOptions(layer=counts_layer), model.config.data.seq_length
    with closing(open_cells(adata, model.vocabulary, seq_length, options)) as cells:
        values_NH, facts = embed_cells(model, cells, choices, shows_progress=True)
        facts |= facts_of_cells(cells)
    if values_NH is None:
        raise ConfigError(
            "geneformer_mcore.embed works in one process, and this is one of several. Remedy: "
            "torchrun launch/embed.py."
        )
    return values_NH, facts


def embed_cells(
    model: Pretrained, cells: Cells, choices: Choices, shows_progress: bool
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """([cells, H] of choices.dtype on rank 0, None on others; facts for uns).

    Raises ConfigError for choices that do not exist.
    """
    pooling, precision = choices.check()
    layers = encoder.number_of_layer(choices.layer, model.config.model.num_layers)
    with (
        encoder.started(model, precision, choices.tokens_per_batch, layers) as engine,
        encoder.progress_line("cells", shows_progress) as progress,
    ):
        work = encoder.embedding(engine, pooling)
        values_NH = encoder.per_cell(engine, cells, work, np.float32, progress)
        facts = facts_of_states(engine, choices, layers)
    return None if values_NH is None else as_dtype(values_NH, choices.dtype), facts


def as_dtype(values_NH: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [N, H] in one of DTYPES; NaN rows stay. Raises DataError beyond float16's range.

    numpy has no bfloat16: such numbers are float32 whose lower 16 bits are 0.
    """
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


def facts_of_states(engine: Encoder, choices: Choices, layers: int | None) -> dict[str, Any]:
    """The model and the choices, in plain text and numbers, which h5ad can hold."""
    model = engine.pretrained
    return facts_of(model) | {
        "layer": choices.layer,
        "layer_number": model.config.model.num_layers if layers is None else layers,
        "final_norm": layers is None,
        "pooling": choices.pooling,
        "precision": engine.precision.value,
        "dtype": choices.dtype,
    }


def facts_of(model: Pretrained) -> dict[str, Any]:
    """The model's sizes and origin, in plain text and numbers."""
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


def has_values(values_NC: np.ndarray) -> np.ndarray:
    """bool [N], False for cells without a known gene."""
    return ~np.isnan(values_NC).any(axis=1)


def as_annotations(values_NH: np.ndarray, facts: Mapping[str, Any], key: str = KEY) -> Beside:
    """The embedding as entries of obsm, obs and uns."""
    return Beside({key: values_NH}, {FLAG: has_values(values_NH)}, {FACTS: dict(facts)})


@dataclass(frozen=True)
class EmbedRequest:
    """Arguments of launch/embed.py; `source` and `output` come together."""

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
    """Embed on all ranks and write from the first one. Returns the lines to print there.

    Raises a GeneformerError for the user's mistakes, those in output paths before any work.
    """
    _check(request)
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    if request.output is None:
        return [*model.messages, *_embed_genes(model, request.gene_embeddings, is_first)]
    choices, started_s = request.choices, time.monotonic()
    seq_length = model.config.data.seq_length
    opened = open_cells(request.source, model.vocabulary, seq_length, request.options)
    with closing(opened) as cells:
        if request.output.suffix == ".h5ad":
            check_annotated(cells)
        values_NH, facts = embed_cells(model, cells, choices, is_first)
        if values_NH is None:
            return list(model.messages)
        with together():
            write_cells(request.output, cells, values_NH, facts | facts_of_cells(cells))
            of_genes = _embed_genes(model, request.gene_embeddings, is_first)
        coverage = coverage_lines(cells)
    num_cells, seconds = len(values_NH), time.monotonic() - started_s
    return [
        *model.messages,
        *of_genes,
        f"{request.output}: {num_cells:,} cells x {values_NH.shape[1]} ({choices.dtype}), "
        f"{(~has_values(values_NH)).sum():,} without a known gene (NaN), {choices.pooling} of "
        f"layer {choices.layer}, {facts['precision']}, {seconds:.1f} s, "
        f"{num_cells / seconds:,.0f} cells/s",
        *coverage,
    ]


def _check(request: EmbedRequest) -> None:
    if (request.output is None) != (not request.source):
        raise ConfigError("`source=` and `output=` go together: cells, and their vectors' place.")
    if request.output is None and request.gene_embeddings is None:
        raise ConfigError(
            "nothing is asked for: give `source=` and `output=`, or `gene_embeddings=`."
        )
    if request.gene_embeddings is not None:
        check_target(request.gene_embeddings, TABLES, request.overwrite)
    if request.output is not None:
        check_target(request.output, OUTPUTS, request.overwrite, request.source)


def check_target(
    path: Path, suffixes: tuple[str, ...], overwrite: bool, source: str | None = None
) -> None:
    """Raise ConfigError for another kind of file or the input itself, DataError where `path` cannot
    be written."""
    if source is not None and path.exists() and Path(source).resolve() == path.resolve():
        raise ConfigError(
            f"{path}: the output must be another file than the input, which is never changed. "
            "Remedy: name another `output=`."
        )
    if path.suffix not in suffixes:
        raise ConfigError(
            f"{path}: the output must end in {' or '.join(suffixes)}, which says what it is, and "
            f"ends in {path.suffix or 'nothing'}."
        )
    check_output(path, overwrite)
    if path.suffix == ".npy":
        check_output(path.with_suffix(".json"), overwrite)


def _embed_genes(model: Pretrained, path: Path | None, is_first: bool) -> list[str]:
    """The line to print; none where nothing was asked for, or another rank writes."""
    if path is None or not is_first:
        return []
    rows = weights_reader.read_tensor(model.folder, weights_reader.WORD_EMBEDDING)
    values_GH = rows[NUM_SPECIALS : model.vocabulary.size].numpy()
    with together():
        write_genes(path, values_GH, model.vocabulary, facts_of(model))
    return [f"{path}: {len(values_GH):,} genes x {values_GH.shape[1]}"]


def write_cells(path: Path, cells: Cells, values_NH: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write the embedding of `cells` as .npy with its facts as .json, or into an h5ad file."""
    if path.suffix == ".npy":
        _write_array(path, values_NH, {**facts, "cells": len(values_NH)})
    else:
        write_annotated(path, cells, as_annotations(values_NH, facts))


def check_annotated(cells: Cells) -> None:
    """Raises DataError, before any work, where write_annotated could not write."""
    if cells.path is not None:
        anndata_out.check_copy(cells.path)


def write_annotated(path: Path, cells: Cells, added: Beside) -> None:
    """Write a copy of the cells' h5ad file with `added` in it; an AnnData of their obs where they
    come from another kind of input."""
    if cells.path is not None:
        anndata_out.write_copy(cells.path, path, added)
    else:
        anndata_out.write_new(cells.obs(), path, added)


def write_genes(
    path: Path, values_GH: np.ndarray, vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Write a vector per gene of the vocabulary, in its order, with id and name."""
    ids, names = vocabulary.feature_ids, vocabulary.names
    if path.suffix == ".npy":
        _write_array(path, values_GH, {**facts, "feature_ids": list(ids), "names": list(names)})
        return
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["feature_id", "name", *range(values_GH.shape[1])])
        for gene, name, vector in zip(ids, names, values_GH, strict=True):
            # float32's own shortest form: reading it back gives the same number.
            writer.writerow([gene, name, *map(str, vector)])


def _write_array(path: Path, values: np.ndarray, content: Mapping[str, Any]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    write_json(path.with_suffix(".json"), dict(content))
