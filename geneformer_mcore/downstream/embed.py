"""Cells and genes as vectors: what launch/embed.py does.

checkpoint + cells  ->  Encoder  ->  vectors in the order of the cells  ->  file
checkpoint          ->  its word embedding                              ->  table of genes
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore import __version__
from geneformer_mcore.cells import annotated
from geneformer_mcore.cells.corpus import InputOptions
from geneformer_mcore.checkpoint import weights
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.contracts import NUM_SPECIALS
from geneformer_mcore.downstream import embedding_files, encoder, pretrained
from geneformer_mcore.downstream.cells import Cells, open_cells
from geneformer_mcore.downstream.encoder import Encoder
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.states import Pooling
from geneformer_mcore.store.progress import ProgressLine, no_progress


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
class Request:
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


def run(request: Request, is_first: bool) -> list[str]:
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
        embedding_files.write_cells(request.output, cells, values_NH, facts)
    found, seconds = embedding_files.is_embedded(values_NH), time.monotonic() - started_s
    missing = int((~found).sum())
    lines.append(
        f"{request.output}: {len(found):,} cells x {values_NH.shape[1]} ({choices.dtype}), "
        f"{missing:,} without a known gene (NaN), {choices.pooling} of layer {choices.layer}, "
        f"{facts['precision']}, {seconds:.1f} s, {len(found) / seconds:,.0f} cells/s"
    )
    return lines


def _check(request: Request) -> None:
    if (request.output is None) != (not request.source):
        raise ConfigError("--input and --output go together: cells, and where their vectors go.")
    if request.output is None and request.gene_embeddings is None:
        raise ConfigError("nothing is asked for: give --input and --output, or --gene-embeddings.")
    files, overwrite = embedding_files, request.overwrite
    if request.gene_embeddings is not None:
        files.check_target(request.gene_embeddings, files.TABLES, overwrite)
    if request.output is None:
        return
    if request.output.exists() and Path(request.source).resolve() == request.output.resolve():
        raise ConfigError(
            f"{request.output}: the output must be another file than the input, which is never "
            "changed. Remedy: name another --output."
        )
    files.check_target(request.output, files.OUTPUTS, overwrite)


def _embed_genes(model: Pretrained, path: Path) -> str:
    rows = weights.read_tensor(model.folder, weights.WORD_EMBEDDING)
    values_GH = rows[NUM_SPECIALS : model.vocabulary.size].numpy()
    embedding_files.write_genes(path, values_GH, model.vocabulary, facts_of(model))
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
    return embedding_files.as_dtype(found, choices.dtype), facts


def checked(choices: Choices) -> tuple[Pooling, Precision | None]:
    """What they name. Raises ConfigError for a name that there is not."""
    precisions = ("fp32", "bf16", "fp16")
    for name, value, allowed in (
        ("pooling", choices.pooling, tuple(each.value for each in Pooling)),
        ("precision", choices.precision, ("", *precisions)),
        ("dtype", choices.dtype, embedding_files.DTYPES),
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
        path = stack.enter_context(annotated.as_file(adata, counts_layer))
        options = InputOptions(layer=counts_layer)
        seq_length = model.config.data.seq_length
        cells = open_cells(str(path), model.vocabulary, seq_length, options)
        stack.callback(cells.close)
        values_NH, facts = embed_cells(model, cells, choices, shows_progress=True)
    if values_NH is None:
        raise ConfigError(
            "geneformer_mcore.embed works in one process, and this is one of several. Remedy: "
            "torchrun launch/embed.py."
        )
    return values_NH, facts
