"""outcome.json: what it says after an end, after a kill, and how often a run was started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.train.run_folder import FINISHED, INTERRUPTED, RunFolder


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


def test_after_a_kill_it_does_not_claim_success(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.open()
    first.close(FINISHED, "done")
    RunFolder(tmp_path).open()  # and then nothing more
    assert outcome(tmp_path)["exit_code"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"run\.dir"):
        RunFolder(tmp_path / "run").open()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="must be a folder that can be written"):
        RunFolder(tmp_path / "run").open()
