"""Cells that a model was trained on are refused by content; and the whole chain by one command."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pytest

from benchmarks import cell_types
from geneformer_mcore.errors import DataError
from tests.distributed.inference.test_classify import classified
from tests.distributed.ranks import run_ranks
from tests.end_to_end.forked import Run
from tests.support import commands

TINY = (
    *("model.num_layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16"),
    *("model.num_attention_heads=2", "data.seq_length=60", "train.micro_batch_size=8"),
    *("train.global_batch_size=16", "train.validate_every_steps=0"),
)


def disguised(h5ad: Path, path: Path) -> Path:
    """The same cells under other names, in another order, with half of the genes, shuffled."""
    rng = np.random.default_rng(8)
    cells = anndata.read_h5ad(h5ad)
    genes, rows = rng.permutation(cells.n_vars)[:150], rng.permutation(cells.n_obs)
    other = cells[rows, genes].copy()
    other.obs_names = [f"nobody_{number}" for number in range(other.n_obs)]
    other.obs["dataset_id"] = "another study"
    other.write_h5ad(path)
    return path


def strangers(h5ad: Path, path: Path) -> Path:
    """Other cells of the same kinds: each gene's counts are permuted among those of a kind."""
    rng = np.random.default_rng(9)
    cells = anndata.read_h5ad(h5ad)
    counts = cells.X.toarray()
    for kind in ("a", "b"):
        rows = np.flatnonzero(cells.obs["cell_type"] == kind)
        counts[rows] = rng.permuted(counts[rows], axis=0)
    cells.X = type(cells.X)(counts)
    cells.write_h5ad(path)
    return path


MORE = ("train.steps=2", "train.validate_every_steps=0")


def test_cells_of_the_training_are_refused_unless_allowed(
    undisturbed: Run, h5ad: Path, store: Path, tmp_path: Path
) -> None:
    judged = disguised(h5ad, tmp_path / "disguised.h5ad")
    others = strangers(h5ad, tmp_path / "strangers.h5ad")
    lines = [
        [
            "--checkpoint",
            str(undisturbed.folder),
            "--input",
            str(cells),
            "--out",
            str(tmp_path / out),
            *more,
        ]
        for cells, out, more in (
            (judged, "refused", ()),
            (judged, "allowed", ("--allow-overlap",)),
            (others, "others", ()),
            (others, "moved", ("--training-store", str(tmp_path / "nowhere"))),
        )
    ]
    lines = [[*line, "--no-plots", "--resamples", "0"] for line in lines]
    ((refused, allowed, fine, moved),) = run_ranks(classified, 1, lines, timeout_s=280)
    num_train = json.loads((store / "manifest.json").read_text())["rows"]["train"]
    num_seen = num_train[1] - num_train[0]
    assert 100 < num_seen < 240
    assert refused.code == 2
    message = f"{num_seen} of 240 cells are among the {num_seen} that undisturbed was trained on"
    assert message in refused.err
    assert "--allow-overlap" in refused.err
    assert not (tmp_path / "refused").exists()
    assert allowed.code == 0, allowed.err
    assert f"note: {message}" in allowed.out
    assert fine.code == 0, fine.err
    found = json.loads((tmp_path / "others" / "results.json").read_text())
    assert found["overlap"]["undisturbed"]["cells"] == 0
    assert found["overlap"]["undisturbed"]["training_cells"] == num_seen
    assert not [note for note in found["notes"] if "trained on" in note]
    assert moved.code == 2
    assert "not a finished store" in moved.err
    assert not (tmp_path / "moved").exists()


def step(*command: str | Path) -> None:
    """The benchmark's step, forked: pretraining by one rank, and no pictures, which tests of
    launch/classify.py draw."""
    words = list(map(str, command))
    if "launch/pretrain.py" in words:
        ranks = ["--nproc_per_node=3", "--rdzv-backend=loopback", "--max-restarts=0"]
        assert words[:5] == ["-m", "torch.distributed.run", *ranks]
        words = words[5:]
    commands.check(*words, *(["--no-plots"] if words[0] == "launch/classify.py" else []))


def test_the_whole_chain_by_one_command(
    h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = disguised(h5ad, tmp_path / "copy.h5ad"), strangers(h5ad, tmp_path / "other.h5ad")
    words = [
        *("cell_types.py", "--train", copy, other, "--labelled", h5ad),
        *("--out", tmp_path / "out", "--steps", "2", "--ranks", "3"),
        *("--resamples", "20", "--set", *TINY),
    ]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    monkeypatch.setattr(cell_types, "step", step)
    assert cell_types.main() == 0
    printed = capsys.readouterr().out
    assert "not on copy.h5ad, which holds 240 of its cells" in printed
    assert "PCA(10) 0.561 / 0.775" in printed
    found = json.loads((tmp_path / "out" / "cell_types.json").read_text())
    (of_set,) = found["sets"]
    assert of_set["trained_on"] == ["other.h5ad"]
    assert of_set["not_trained_on"] == {"copy.h5ad": 240}
    assert of_set["overlap"]["pretrained"]["cells"] == 0
    assert of_set["pretraining"]["steps"] == 2
    rows = {(row["features"], row["classifier"]) for row in of_set["schemes"][0]["rows"]}
    assert ("pretrained", "random forest") in rows
    assert len(rows) == 9


def test_a_step_that_fails_ends_the_chain() -> None:
    with pytest.raises(DataError, match=r"launch/cache_store\.py ended with 2"):
        cell_types.step("launch/cache_store.py")


def test_the_chain_refuses_what_leaves_nothing_to_train_on(h5ad: Path, tmp_path: Path) -> None:
    words = ("--train", h5ad, "--labelled", h5ad, "--out", tmp_path / "out")
    ended = commands.run("benchmarks/cell_types.py", *words)
    assert ended.returncode == 2, ended.stderr
    assert "none is left to train on" in ended.stderr
    assert "Traceback" not in ended.stderr
