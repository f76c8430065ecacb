"""Step folders: complete or not there, verified, kept and removed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import folder
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.io.files import write_sealed

RENAME = Path.rename


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000000007"]


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


def change_manifest(path: Path) -> None:
    """Sound JSON that says something else."""
    manifest = path / folder.MANIFEST
    manifest.write_text(manifest.read_text().replace('"bytes": 1000', '"bytes": 1001'))


def rename_file(path: Path) -> None:
    (path / "a.bin").rename(path / "c.bin")


def link_file(path: Path) -> None:
    """The same content, but it lies elsewhere, where anyone may change it."""
    (path / "a.bin").rename(path.parent / "elsewhere")
    (path / "a.bin").symlink_to(path.parent / "elsewhere")


def link_folder(path: Path) -> None:
    (path / "sub").rename(path.parent / "other")
    (path / "sub").symlink_to(path.parent / "other")


def seal(path: Path, **changes: object) -> None:
    """Somebody who knows how manifests are sealed changes one."""
    manifest = path / folder.MANIFEST
    content = json.loads(manifest.read_text())
    del content["checksum"]
    write_sealed(manifest, content | changes)


def name_a_file_elsewhere(path: Path) -> None:
    (path.parent / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    seal(path, files={"../secret": entry})


def take_another_step(path: Path) -> None:
    seal(path, step=9)


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        truncate_file,
        delete_file,
        spoil_manifest,
        change_manifest,
        rename_file,
        link_file,
        link_folder,
        name_a_file_elsewhere,
        take_another_step,
    ],
)
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


def test_retention_keeps_the_best(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    folder.retain(tmp_path, keep_last=1, keep_every=0, best=20)
    assert folder.steps(tmp_path) == [20, 40]


@pytest.mark.parametrize("killed_at", ["before the new one has the name", "after"])
def test_a_kill_while_a_step_is_saved_again_loses_neither(tmp_path: Path, killed_at: str) -> None:
    write(tmp_path, 5, "first")
    kill = {"before the new one has the name": 2, "after": 3}[killed_at]
    calls = []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == kill:
            raise KeyboardInterrupt
        return RENAME(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        patched.setattr(folder.shutil, "rmtree", lambda *_, **__: rename(tmp_path, tmp_path))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 5, "second")
    found, messages = folder.newest_good(tmp_path)
    assert found is not None
    assert messages == []
    expected = "first" if killed_at.startswith("before") else "second"
    assert (found / "a.bin").read_text() == expected
    write(tmp_path, 7)
    assert folder.steps(tmp_path) == [5, 7]
    assert not list(tmp_path.glob(".*_step_*"))


def test_the_pointer_is_a_hint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 7)
    assert (tmp_path / "latest").read_text() == "step_0000000007\n"
    (tmp_path / "latest").write_text("step_0000000099\n")
    found, _ = folder.newest_good(tmp_path)
    assert found == folder.step_folder(tmp_path, 7)


def test_verify_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    damage_byte(path)
    with pytest.raises(CheckpointError, match=r"b\.bin is damaged"):
        folder.verify(path)
