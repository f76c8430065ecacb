"""Step folders: complete or not there, verified, kept and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import folder
from geneformer_mcore.errors import CheckpointError


def write(root: Path, step: int, content: str = "weights") -> Path:
    staging = folder.make_staging(root, step)
    (staging / "sub").mkdir()
    (staging / "a.bin").write_text(content)
    (staging / "sub" / "b.bin").write_text("b" * 1000)
    return folder.commit(staging, root, step)


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    staging = folder.make_staging(tmp_path, 5)
    (staging / "a.bin").write_text("half")
    assert folder.steps(tmp_path) == []
    assert write(tmp_path, 5).name == "step_0000000005"
    assert folder.steps(tmp_path) == [5]
    assert not staging.exists()


def test_leftovers_of_a_kill_are_cleared_by_the_next_save(tmp_path: Path) -> None:
    (folder.make_staging(tmp_path, 5) / "a.bin").write_text("half")
    write(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000000007"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    write(tmp_path, 5, "first")
    assert (write(tmp_path, 5, "second") / "a.bin").read_text() == "second"


def damage_byte(path: Path) -> None:
    data = bytearray((path / "sub" / "b.bin").read_bytes())
    data[500] ^= 1
    (path / "sub" / "b.bin").write_bytes(data)


def truncate_file(path: Path) -> None:
    (path / "sub" / "b.bin").write_text("b" * 999)


def delete_file(path: Path) -> None:
    (path / "a.bin").unlink()


def spoil_manifest(path: Path) -> None:
    (path / folder.MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [damage_byte, truncate_file, delete_file, spoil_manifest])
def test_the_newest_that_verifies_wins_and_the_damaged_one_is_set_aside(
    tmp_path: Path, damage
) -> None:
    good, bad = write(tmp_path, 5), write(tmp_path, 7)
    damage(bad)
    found, messages = folder.newest_good(tmp_path)
    assert found == good
    assert len(messages) == 1
    assert "damaged_step_0000000007" in messages[0]
    assert folder.steps(tmp_path) == [5]
    assert folder.newest_good(tmp_path) == (good, [])


def test_if_none_verifies_nothing_is_begun_anew(tmp_path: Path) -> None:
    damage_byte(write(tmp_path, 5))
    delete_file(write(tmp_path, 7))
    (tmp_path / "step_0000000009").mkdir()  # not even a manifest
    for _ in range(2):  # nor at the next start
        with pytest.raises(CheckpointError, match="3 checkpoint"):
            folder.newest_good(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert folder.newest_good(tmp_path / "nowhere") == (None, [])


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path, 5) / folder.MANIFEST).read_text())
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["sub/b.bin"]["bytes"] == 1000


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    folder.retain(tmp_path, keep_last=2, keep_every=20)
    assert folder.steps(tmp_path) == [20, 40, 50]
    folder.retain(tmp_path, keep_last=1, keep_every=0)
    assert folder.steps(tmp_path) == [50]


def test_verify_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    damage_byte(path)
    with pytest.raises(CheckpointError, match=r"b\.bin is damaged"):
        folder.verify(path)
