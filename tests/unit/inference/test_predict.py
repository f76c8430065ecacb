"""A label's name may hold what no file takes: the output is one that anndata reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.inference import predict
from geneformer_mcore.io import anndata_out


def test_a_label_with_a_slash_names_columns_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "facts_of", lambda model: {"step": 3})
    found_NC = np.array([[0.2, 0.8], [np.nan, np.nan]], np.float32)
    added = predict._annotations(
        SimpleNamespace(), found_NC, "author/lab", ["one", "t/o"], {"input": {"genes_known": 1}}
    )
    obs = pd.DataFrame({"author/lab": ["one", "t/o"], "author": 1}, index=["c0", "c1"])
    anndata_out.write_new(obs, tmp_path / "a.h5ad", added)
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.obs["predicted_author_lab"].tolist() == ["t/o", np.nan]
    assert found.obs["author_lab"].tolist() == ["one", "t/o"]
    assert found.obsm["predicted_author_lab_probabilities"].shape == (2, 2)
    facts = found.uns["geneformer_predicted_author_lab"]
    assert (facts["label"], facts["input"]["genes_known"]) == ("author/lab", 1)
