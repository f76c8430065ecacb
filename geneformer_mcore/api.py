"""Functions for notebooks, in the manner of scanpy: `geneformer_mcore.embed` and `.perturb`.

    AnnData  ->  its counts in memory  ->  as launch/embed.py does    ->  obsm, obs, uns
                             ->  as launch/perturb.py does  ->  a new AnnData

Light to import: torch is imported by the first call.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
    """Add a Geneformer embedding of every cell to an AnnData.

        geneformer_mcore.embed(adata, "runs/demo")
        sc.pp.neighbors(adata, use_rep="X_geneformer")

    adata:             cells with counts in layers["counts"], raw.X or X (the first that holds
                       counts), genes by Ensembl id or symbol
    checkpoint:        a run directory (its latest valid checkpoint) or one of its step folders
    layer:             "last" (after the final norm), "second-to-last", or a number of layers
    pooling:           "mean" over the genes of a cell, or "cls"
    precision:         "fp32", "bf16" or "fp16"; by default what suits the device
    dtype:             "float32", "float16", or "bfloat16" (float32 rounded to it)
    vocabulary:        its file, where the store that the run was trained on has moved
    counts_layer:      the layer of the counts, if they are in none of the usual places
    key_added:         the name in obsm
    copy:              leave `adata` alone, and return a copy in memory; a view of a backed AnnData
                       takes nothing and needs this

    Sets obsm[key_added] ([cells, width], NaN rows for cells without a known gene),
    obs["geneformer_embedded"] (False for those) and uns["geneformer"] (model, checkpoint, layer).
    Returns None, or the copy. Works in this process, on its GPU or CPU. Raises a GeneformerError
    with the remedy for mistakes.
    """
    with warnings.catch_warnings():
        ignore_known_warnings()
        from geneformer_mcore.inference.embed import Choices, as_annotations, embed_adata
        from geneformer_mcore.io import anndata_out

        anndata_out.check_annotations(adata, key_added, copy)
        choices = Choices(str(layer), pooling, precision, dtype, tokens_per_batch)
        values_NH, facts = embed_adata(adata, checkpoint, choices, vocabulary, counts_layer)
    target = anndata_out.copy_of(adata) if copy else adata
    as_annotations(values_NH, facts, key_added).put(target)
    return target if copy else None


def perturb(
    adata: Any,
    checkpoint: str | Path,
    genes: Sequence[str] = (),
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    top: int | None = None,
    mode: str = "delete",
    truncated: bool = False,
    start: str = "",
    goal: str = "",
    max_cells: int = 0,
    null: int = 100,
    seed: int = 0,
    layer: str | int = "last",
    pooling: str = "mean",
    precision: str = "",
    tokens_per_batch: int = 0,
    vocabulary: str | Path | None = None,
    counts_layer: str | None = None,
) -> Any:
    """Delete or overexpress genes, and measure the displacement of each cell's embedding.

        shifts = geneformer_mcore.perturb(adata, "runs/demo", ["GATA1", "SPI1"], max_cells=200)
        shifts.var.sort_values("p")

    adata, checkpoint, layer, pooling, precision, vocabulary, counts_layer:  as for `embed`
    genes, groups, top:  genes one by one (ids or symbols), {name: genes} at once, the `top` genes
                         in most cells (-1: every gene); any of these
    mode:                "delete", or "overexpress" (moved to the front of the cell's ranking)
    truncated:           delete from the truncated cell, as Geneformer's own code does
    start, goal:         "COLUMN=VALUE" of obs: only these cells; measure shifts toward those
    max_cells, seed:     at most so many cells (0: all), drawn at random by the seed
    null:                random genes to compare each with (0: no p)

    Returns an AnnData of cells x perturbations: X the shift (1 - cosine) of the cell's vector, NaN
    where the gene is not in the cell, layers "gene_shift" and, with a goal, "goal_shift"; var the
    means, p and q; uns["geneformer"]. `adata` is left alone. Raises a GeneformerError with the
    remedy for mistakes.
    """
    with warnings.catch_warnings():
        ignore_known_warnings()
        from geneformer_mcore.inference.embed import Choices
        from geneformer_mcore.perturbation.question import Question
        from geneformer_mcore.perturbation.request import perturb_adata

        named = None if groups is None else {name: list(each) for name, each in groups.items()}
        question = Question(
            genes, named, top, mode, truncated, start, goal, max_cells, null, seed=seed
        )
        choices = Choices(str(layer), pooling, precision, tokens_per_batch=tokens_per_batch)
        return perturb_adata(adata, checkpoint, question, choices, vocabulary, counts_layer)
