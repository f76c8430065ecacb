"""Numbers that are kept: whole or not at all, and a place that cannot be written is named early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import files


def test_it_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "numbers.json"
    files.save_json(place, {"loss": 1.5})
    files.save_json(place, {"loss": 2.5})
    assert json.loads(place.read_text()) == {"loss": 2.5}
    assert [path.name for path in place.parent.iterdir()] == ["numbers.json"]


def test_what_cannot_be_json_leaves_the_old_numbers(tmp_path: Path) -> None:
    place = tmp_path / "numbers.json"
    files.save_json(place, {"loss": 1.5})
    with pytest.raises(TypeError):
        files.save_json(place, {"loss": object()})
    assert json.loads(place.read_text()) == {"loss": 1.5}


def test_asking_leaves_nothing(tmp_path: Path) -> None:
    files.check_result_place(tmp_path / "numbers.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a_file/numbers.json", "a_folder", "a_file/deeper/numbers.json"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(DataError, match=rf"{name} cannot be written \("):
        files.check_result_place(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} cannot be written \("):
        files.save_json(tmp_path / name, {})
