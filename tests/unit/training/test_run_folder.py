"""outcome.json after an end and after a kill, the number of starts, and refused folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, INTERRUPTED, WRONG_INPUT
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.training.run_folder import RunFolder
from tests.support.small_cells import vocabulary_of


def outcome(path: Path) -> dict:
    return json.loads((path / "outcome.json").read_text())


def opened(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.open()
    return run


def test_an_end_is_written_and_starts_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = opened(path)
    assert outcome(path)["exit_code"] == 1, "until it ends it does not claim success"
    run.step = 7
    run.close(INTERRUPTED, "signal TERM\n  again\n")
    found = {"outcome": "interrupted", "exit_code": 75, "step": 7, "restart": 0}
    assert outcome(path) == {**found, "reason": "signal TERM again"}, "a reason of one line"
    opened(path).close(FINISHED, "done")
    assert (outcome(path)["restart"], outcome(path)["exit_code"]) == (1, 0)
    killed = opened(path)
    assert outcome(path)["exit_code"] == 1, "nor after a start that did"
    killed.close(FINISHED, "done")


def test_it_keeps_the_vocabulary_of_its_cells(tmp_path: Path) -> None:
    # A start that saved nothing may have had other cells.
    for vocabulary in (vocabulary_of(5), vocabulary_of(5), vocabulary_of(7)):
        RunFolder(tmp_path).write_vocabulary(vocabulary)
        assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


def test_two_starts_cannot_share_a_folder(tmp_path: Path) -> None:
    first, second = opened(tmp_path), RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="another start"):
        second.open()
    second.close(WRONG_INPUT, "refused")
    assert outcome(tmp_path)["outcome"] == "running", "the first one's outcome is left alone"
    first.close(FINISHED, "done")
    second.open()
    second.close(FINISHED, "done")


@pytest.mark.parametrize(
    ("name", "error"),
    [("run", "must be a folder that can be written"), ("run/checkpoints", "File exists"),
     ("run/tensorboard", "File exists")],
)  # fmt: skip
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=error):
        RunFolder(tmp_path / "run").open()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"run\.dir"):
        RunFolder(tmp_path / "run").open()


def test_a_rank_that_is_left_writes_the_end_only_if_rank_0_did_not(tmp_path: Path) -> None:
    first, left = opened(tmp_path), RunFolder(tmp_path)
    first.close(DEFECT, "rank 1 is lost")
    left.take_over(DEFECT, "cut off from rank 0", 4)
    assert outcome(tmp_path)["reason"] == "rank 1 is lost"
    killed = opened(tmp_path)
    assert killed._lock is not None
    killed._lock.close()
    left.take_over(DEFECT, "rank 0 is lost", 4)
    assert (outcome(tmp_path)["reason"], outcome(tmp_path)["step"]) == ("rank 0 is lost", 4)
