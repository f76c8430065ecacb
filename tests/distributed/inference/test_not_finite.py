"""Weights that are NaN, and finite ones that overflow: refused by every command, nothing written.

One number of a small trained model is changed, and the whole model written again as a run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.convert import converted_run
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.inference import pretrained
from geneformer_mcore.store.ingest.build import build_store
from tests.distributed import toy
from tests.distributed.commands import assert_refused, calls
from tests.distributed.inference.trained import Trained, words
from tests.distributed.parity import TP2
from tests.distributed.ranks import run_ranks

NAN, HUGE, ENDLESS = "nan", "huge", "endless"
CHANGES = {
    NAN: ("encoder.layers.1.mlp.linear_fc2.weight", float("nan")),
    ENDLESS: ("encoder.layers.3.self_attention.linear_qkv.bias", float("inf")),
    HUGE: ("encoder.final_layernorm.weight", 3e38),
}
"""Name -> (a tensor, what all its numbers become). Of the last every one is finite."""


def write_changed(run: Path, place: Path) -> None:
    """The run once per change, in folders of that name."""
    dist.destroy_process_group()
    model = pretrained.find(run)
    for name, (tensor, value) in CHANGES.items():
        weights = weights_reader.read_weights(model.folder)
        weights[tensor].fill_(value)
        converted_run.write(place / name, model.config, model.vocabulary, weights, {})


@pytest.fixture(scope="module")
def place(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the changed runs, and a store of the cells."""
    place = tmp_path_factory.mktemp("changed")
    run_ranks(write_changed, 1, model.run, place)
    source, vocabulary = [str(model.h5ad)], model.vocabulary
    build_store(source, place / "store", vocabulary=vocabulary, seq_length=toy.SEQ_LENGTH)
    return place


@pytest.mark.parametrize("name", [NAN, ENDLESS])
def test_a_weight_that_is_not_finite_is_named(name: str, place: Path) -> None:
    message = rf"1 of \d+ tensors hold NaN or infinite ones: {CHANGES[name][0]}\."
    with pytest.raises(CheckpointError, match=message):
        pretrained.find(place / name)


def lines(run: Path, model: Trained, place: Path, out: Path) -> dict[str, list[str]]:
    """{command: a line that asks for all it can of `run`}"""
    start, store = ["--checkpoint", run], place / "store"
    cells = [*start, "--input", model.h5ad]
    return {
        "embed": words(*cells, "--output", out / "b.h5ad"),
        "evaluate": words(*start, "--store", store, "--json", out / "e.json"),
        "perturb": words(*cells, "--top 2 --null 0", "--table", out / "p.csv"),
        "classify": words("--checkpoint", f"one={run}", "--input", model.h5ad, "--allow-overlap",
                          "--label cell_type --donor none", "--out", out / "types"),
    }  # fmt: skip


def test_every_command_refuses_the_weights(model: Trained, place: Path, tmp_path: Path) -> None:
    run = place / NAN
    for name, line in lines(run, model, place, tmp_path).items():
        assert_refused(name, {f"ones: {CHANGES[NAN][0]}": line})
    more = {
        "embed": words("--checkpoint", run, "--gene-embeddings", tmp_path / "g.csv"),
        "convert": words("to-hf", run, "--out", tmp_path / "hf"),
        "finetune": words("--checkpoint", run, "--store", place / "store", "--label cell_type",
                          f"run.dir={tmp_path / 'tuned'}"),
    }  # fmt: skip
    for name, line in more.items():
        assert_refused(name, {f"ones: {CHANGES[NAN][0]}": line})
    assert not list(tmp_path.iterdir())


def test_an_overflow_is_not_taken_for_a_cell_without_genes(
    model: Trained, place: Path, tmp_path: Path
) -> None:
    """It ends in one message, on several ranks of a model too."""
    asked = lines(place / HUGE, model, place, tmp_path)
    told = "cells with known genes are not, the first in row 0"
    for name, line in asked.items():
        assert_refused(name, {told: line})
    both = run_ranks(calls, 2, [["embed", *asked["embed"], TP2]])
    assert [[ended.code for ended in found] for found in both] == [[2], [2]]
    assert told in both[0][0].err
    assert not list(tmp_path.iterdir())
