"""launch/convert.py as a user meets it, and pretraining that begins with converted weights."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.convert.hf_keys import WORDS
from tests.distributed.inference import conversions
from tests.end_to_end.conftest import NUM_GENES
from tests.end_to_end.forked import Run
from tests.support import commands, plain_bert

SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "positions": 100}
LIKE_IT = ("model.norm=post", "train.validate_every_steps=0", "train.steps=4", "optim.lr=1e-3")


convert = partial(commands.run, "launch/convert.py")


@pytest.fixture(scope="module")
def converted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small V1-like model with the genes of the small store."""
    place = tmp_path_factory.mktemp("converted")
    weights = plain_bert.random_weights(**SHAPE, tokens=NUM_GENES + 2)  # type: ignore[arg-type]
    conversions.write_hf(place / "hf", weights, 2)
    vocabulary = store / "vocabulary.json"
    ended = convert("from-hf", place / "hf", "--out", place / "run", "--vocabulary", vocabulary)
    assert ended.returncode == 0, ended.stderr
    assert "2 layers x 32, post-LN, relu, 305 tokens, 100 positions" in ended.stdout
    assert "[CLS], [SEP], [UKW]" in ended.stdout
    assert ended.stderr == ""
    return place / "run"


def test_mistakes_get_one_message_and_exit_code_2(converted: Path, tmp_path: Path) -> None:
    ended = convert("to-hf", converted, "--out", tmp_path)
    assert (ended.returncode, ended.stderr[:7]) == (2, "error: ")
    assert "exists already" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert convert("to-hf", tmp_path / "no", "--out", tmp_path / "x").returncode == 2
    assert not (tmp_path / "x").exists()


def test_it_goes_back_to_hugging_face(converted: Path, tmp_path: Path) -> None:
    ended = convert("to-hf", converted, "--out", tmp_path / "hf")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert "began with | Hugging Face: hf" in (tmp_path / "hf" / "README.md").read_text()


@pytest.fixture
def copy(run: Run, converted: Path) -> Run:
    """The converted run, to begin with."""
    shutil.copytree(converted, run.folder)
    return run


@pytest.mark.parametrize(("ranks", "more"), [(1, "train.precision=bf16"), (2, "parallel.tensor=2")])
def test_pretraining_goes_on_from_it(copy: Run, ranks: int, more: str) -> None:
    assert "begins with the converted weights" in copy.check(*LIKE_IT, more, ranks=ranks)
    first, last = (
        weights_reader.read_weights(copy.folder / "checkpoints" / f"step_{step:010d}")[WORDS]
        for step in (0, 4)
    )
    moved = (last - first).abs().max()
    assert 0 < moved < 0.02, "four updates away from the converted weights"
    # From then on it is a run like others.
    printed = copy.check(*LIKE_IT, more, "optim.lr=1e-4", ranks=ranks, code=2)
    assert "optim.lr: 0.001 -> 0.0001" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.norm=pre", "model.norm: post -> pre"),
        ("model.activation=gelu", "model.activation: relu -> gelu"),
        ("data.seq_length=64", "data.seq_length: 100 -> 64"),
        ("model.num_attention_heads=4", "model.num_attention_heads: 2 -> 4"),
    ],
)
def test_another_model_cannot_begin_with_it(copy: Run, change: str, message: str) -> None:
    assert message in copy.check(*LIKE_IT, change, code=2)


def test_cells_of_another_vocabulary_are_refused(run: Run, tmp_path: Path) -> None:
    weights = plain_bert.random_weights(**SHAPE, tokens=9 + 2)  # type: ignore[arg-type]
    conversions.write_hf(tmp_path / "hf", weights, 2)
    vocabulary = tmp_path / "other.json"
    conversions.vocabulary_of(9).save(vocabulary)
    words = ("--out", run.folder, "--vocabulary", vocabulary)
    assert convert("from-hf", tmp_path / "hf", *words).returncode == 0
    assert "vocabulary checksum" in run.check(*LIKE_IT, code=2)


def test_a_run_finds_its_vocabulary_in_its_store(run: Run, tmp_path: Path) -> None:
    run.check("train.steps=2", "train.validate_batches=1", ranks=2)
    ended = convert("to-hf", run.folder, "--out", tmp_path / "hf")
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["MegatronBertForMaskedLM"]
    assert config["vocab_size"] == NUM_GENES + 5
    loss = run.records()[-1]["val_loss"]
    assert f"nats per masked gene | {loss:.4f} |" in (tmp_path / "hf" / "README.md").read_text()
