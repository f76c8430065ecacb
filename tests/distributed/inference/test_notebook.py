"""What a notebook calls, on every kind of AnnData. CONTRIBUTING.md says how to run this file with
another anndata."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import torch

from geneformer_mcore.errors import ConfigError, DataError
from tests.distributed.commands import succeed
from tests.distributed.inference.trained import NUM_GENES, NUM_UNKNOWN, Trained, words
from tests.distributed.ranks import run_ranks

HALF = slice(20, None)
KINDS: dict[str, tuple[bool, bool]] = {
    "in memory": (False, False),
    "view": (False, True),
    "backed": (True, False),
    "backed view": (True, True),
}
"""Name -> (whether backed, whether a view)."""


def given(path: str, kind: str) -> Any:
    is_backed, is_view = KINDS[kind]
    adata = anndata.read_h5ad(path, backed="r" if is_backed else None)
    return adata[HALF] if is_view else adata


def on_every_kind(run: str, path: str) -> dict[tuple[str, bool], np.ndarray | str]:
    """{(kind, copy): the embedding | the message}; perturb's is under copy too."""
    import geneformer_mcore

    os.environ.pop("RANK")
    torch.distributed.destroy_process_group()
    found: dict[tuple[str, bool], np.ndarray | str] = {}
    for kind in KINDS:
        for copy in (False, True):
            adata = given(path, kind)
            try:
                returned = geneformer_mcore.embed(adata, run, copy=copy)
            except DataError as error:
                assert "X_geneformer" not in adata.obsm
                found[kind, copy] = str(error)
                continue
            target = returned if copy else adata
            assert ("X_geneformer" in adata.obsm) == (not copy)
            assert target.uns["geneformer"]["input"]["counts_location"] == "X"
            found[kind, copy] = target.obsm["X_geneformer"]
        shifts = geneformer_mcore.perturb(given(path, kind), run, top=1, null=0, max_cells=3)
        assert shifts.n_obs == 3
        shifts.write_h5ad(Path(path).with_name("shifts.h5ad"))
    for key in ("a/b", ""):
        with pytest.raises(ConfigError, match="`key_added=` must be a name"):
            geneformer_mcore.embed(anndata.read_h5ad(path), "no run is looked for", key_added=key)
    return found


def test_every_kind_of_anndata(model: Trained, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    shutil.copyfile(model.h5ad, path)
    (found,) = run_ranks(on_every_kind, 1, str(model.run), str(path))
    whole = found["in memory", False]
    for (kind, copy), values in found.items():
        if (kind, copy) == ("backed view", False):
            assert "a view of a backed one" in values
            continue
        expected = whole[HALF] if KINDS[kind][1] else whole
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6, err_msg=f"{kind} {copy}")


def test_how_much_is_known_is_shown_and_kept(model: Trained, tmp_path: Path) -> None:
    """Also of a file whose names are bytes, as other writers leave them."""
    path, out, table = (tmp_path / name for name in ("a.h5ad", "b.h5ad", "t.csv"))
    shutil.copyfile(model.h5ad, path)
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["encoding-type"] = np.bytes_(b"dataframe")
    ask = ("--checkpoint", model.run, "--input", path)
    embedded, perturbed = succeed(
        [
            words("embed", *ask, "--output", out),
            words("perturb", *ask, "--top 1 --null 0 --table", table),
        ]
    )
    line = f"{NUM_GENES} of 725 genes are known (100.0% of the model's), with "
    for ended in (embedded, perturbed):
        assert line in ended.out
        assert "counts in X, gene ids in var index" in ended.out
    facts = anndata.read_h5ad(out).uns["geneformer"]["input"]
    assert (facts["genes_known"], facts["genes_unknown"]) == (NUM_GENES, NUM_UNKNOWN)
    assert 0.9 < facts["counts_covered"] < 1
