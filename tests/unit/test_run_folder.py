"""outcome.json: what it says after an end, after a kill, and how often a run was started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, INTERRUPTED, WRONG_INPUT
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.training.run_folder import RunFolder
from tests.small_cells import vocabulary_of


def outcome(path: Path) -> dict:
    return json.loads((path / "outcome.json").read_text())


def test_an_end_is_written_and_starts_are_counted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open()
    run.step = 7
    run.close(INTERRUPTED, "signal TERM")
    assert outcome(run.path) == {
        "outcome": "interrupted",
        "exit_code": 75,
        "step": 7,
        "reason": "signal TERM",
        "restart": 0,
    }
    again = RunFolder(tmp_path / "run")
    again.open()
    again.close(FINISHED, "done")
    assert (outcome(run.path)["restart"], outcome(run.path)["exit_code"]) == (1, 0)


def test_it_keeps_the_vocabulary_of_its_cells(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for vocabulary in (vocabulary_of(5), vocabulary_of(5), vocabulary_of(7)):
        # A start that saved nothing may have had other cells.
        run.write_vocabulary(vocabulary)
        assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


def test_until_it_ends_it_does_not_claim_success(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.open()
    first.close(FINISHED, "done")
    killed = RunFolder(tmp_path)
    killed.open()
    assert outcome(tmp_path)["exit_code"] == 1
    killed.close(FINISHED, "done")


def test_two_starts_cannot_share_a_folder(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    with pytest.raises(ConfigError, match="another start"):
        second.open()
    second.close(WRONG_INPUT, "refused")
    assert outcome(tmp_path)["outcome"] == "running", "the first one's outcome is left alone"
    first.close(FINISHED, "done")
    second.open()
    second.close(FINISHED, "done")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_files_in_the_place_of_its_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="File exists"):
        RunFolder(tmp_path).open()


def test_the_reason_is_one_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open()
    run.close(WRONG_INPUT, "first\n  second\n")
    assert outcome(tmp_path)["reason"] == "first second"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"run\.dir"):
        RunFolder(tmp_path / "run").open()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="must be a folder that can be written"):
        RunFolder(tmp_path / "run").open()


def test_a_rank_that_is_left_tells_the_end_only_if_rank_0_did_not(tmp_path: Path) -> None:
    first, left = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    first.close(DEFECT, "rank 1 is lost")
    left.take_over(DEFECT, "cut off from rank 0", 4)
    assert outcome(tmp_path)["reason"] == "rank 1 is lost"
    killed = RunFolder(tmp_path)
    killed.open()
    assert killed._lock is not None
    killed._lock.close()
    left.take_over(DEFECT, "rank 0 is lost", 4)
    assert (outcome(tmp_path)["reason"], outcome(tmp_path)["step"]) == ("rank 0 is lost", 4)
