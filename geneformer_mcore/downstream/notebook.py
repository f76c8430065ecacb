"""`geneformer_mcore.embed`: what a user of scanpy calls from a notebook.

    AnnData  ->  its counts in a file for the while  ->  as launch/embed.py does  ->  obsm, obs, uns

Imported by the package when it is asked for, and importing what takes seconds when it is called.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from geneformer_mcore.backends import ignore_known_warnings


def embed(
    adata: Any,
    checkpoint: str | Path,
    *,
    layer: str | int = "last",
    pooling: str = "mean",
    precision: str = "",
    dtype: str = "float32",
    tokens_per_batch: int = 0,
    vocabulary: str | Path | None = None,
    counts_layer: str | None = None,
    key_added: str = "X_geneformer",
    copy: bool = False,
) -> Any:
    """Adds a Geneformer embedding of every cell to an AnnData, as scanpy's tools add theirs.

        geneformer_mcore.embed(adata, "runs/demo")
        sc.pp.neighbors(adata, use_rep="X_geneformer")

    adata:             cells with counts in layers["counts"], raw.X or X (the first that holds
                       counts), genes by Ensembl id or symbol
    checkpoint:        a run's folder (its newest checkpoint) or one of its step folders
    layer:             "last" (after the final norm), "second-to-last", or a number of layers
    pooling:           "mean" over the genes of a cell, or "cls"
    precision:         "fp32", "bf16" or "fp16"; by default what suits the device
    dtype:             "float32", "float16", or "bfloat16" (float32 rounded to it)
    vocabulary:        its file, where the store that the run was trained on has moved
    counts_layer:      the layer of the counts, if they are in none of the usual places
    key_added:         the name in obsm
    copy:              leave `adata` alone, and return a copy

    Sets obsm[key_added] ([cells, width], NaN rows for cells without a known gene),
    obs["geneformer_embedded"] (False for those) and uns["geneformer"] (model, checkpoint, layer).
    Returns None, or the copy. Works in this process, on its GPU or CPU. Raises a GeneformerError
    that says what to mend.
    """
    choices = {"layer": str(layer), "pooling": pooling, "precision": precision, "dtype": dtype}
    with warnings.catch_warnings():
        ignore_known_warnings()
        from geneformer_mcore.downstream import embedding_files
        from geneformer_mcore.downstream.embed import Choices, embed_adata

        values_NH, facts = embed_adata(
            adata,
            checkpoint,
            Choices(**choices, tokens_per_batch=tokens_per_batch),
            vocabulary,
            counts_layer,
        )
    target = adata.copy() if copy else adata
    embedding_files.beside(values_NH, facts, key_added).put(target)
    return target if copy else None
