"""Step folders: complete or not there, verified, kept and removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
    """A save clears the leftovers of a killed one; the same step can be saved again."""
    staging = folder.make_staging(tmp_path, 5)
    (staging / "a.bin").write_text("half")
    assert folder.newest_good(tmp_path) == (None, [])
    assert folder.newest_good(tmp_path / "nowhere") == (None, [])
    assert write(tmp_path, 5).name == "step_0000000005"
    assert (write(tmp_path, 5, "second") / "a.bin").read_text() == "second"
    (folder.make_staging(tmp_path, 6) / "a.bin").write_text("half")
    write(tmp_path, 7)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_0000000005", "step_0000000007"]
    assert (tmp_path / "latest").read_text() == "step_0000000007\n"
    (tmp_path / "latest").write_text("step_0000000099\n")
    found = folder.newest_good(tmp_path)
    assert found == (folder.step_folder(tmp_path, 7), []), "the pointer is a hint"


def link(path: Path) -> None:
    """The same content, but it lies elsewhere, where anyone may change it."""
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def forge_manifest(path: Path, seal: bool = True, **changes: object) -> None:
    """A change, by default with the right seal."""
    manifest = path / folder.MANIFEST
    content = json.loads(manifest.read_text()) | changes
    if seal:
        del content["checksum"]
        write_sealed(manifest, content)
    else:
        manifest.write_text(json.dumps(content))


ONE_BYTE = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


def name_a_file_elsewhere(step: Path) -> None:
    (step.parent / "secret").write_text("x")
    forge_manifest(step, files={"../secret": ONE_BYTE})


def name_a_file_behind_a_link(step: Path) -> None:
    (step.parent / "secret").write_text("x")
    (step / "sub" / "deep").symlink_to(step.parent)
    forge_manifest(step, files={"sub/deep/secret": ONE_BYTE})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda step: (step / "sub" / "b.bin").write_text("b" * 999 + "c"),
    "a truncated file": lambda step: (step / "sub" / "b.bin").write_text("b" * 999),
    "a missing file": lambda step: (step / "a.bin").unlink(),
    "a renamed file": lambda step: (step / "a.bin").rename(step / "c.bin"),
    "a link to a file": lambda step: link(step / "a.bin"),
    "a link to a folder": lambda step: link(step / "sub"),
    "a broken manifest": lambda step: (step / folder.MANIFEST).write_text("{"),
    "a changed manifest": lambda step: forge_manifest(step, seal=False, note="x"),
    "a forged file elsewhere": name_a_file_elsewhere,
    "a forged file behind a link": name_a_file_behind_a_link,
    "a forged step": lambda step: forge_manifest(step, step=9),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_latest_valid_one_wins_and_the_damaged_one_is_set_aside(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good, bad = write(tmp_path, 5), write(tmp_path, 7)
    damage(bad)
    found, (message,) = folder.newest_good(tmp_path)
    assert found == good
    assert "damaged_step_0000000007" in message
    assert folder.steps(tmp_path) == [5]
    assert folder.newest_good(tmp_path) == (good, [])


def test_if_none_is_valid_no_run_starts_over(tmp_path: Path) -> None:
    DAMAGES["a flipped bit"](write(tmp_path, 5))
    DAMAGES["a missing file"](write(tmp_path, 7))
    (tmp_path / "step_0000000009").mkdir()  # not even a manifest
    for _ in range(2):  # nor at the next start
        with pytest.raises(CheckpointError, match="3 checkpoint"):
            folder.newest_good(tmp_path)


def test_the_manifest_names_every_file_and_verify_the_damaged_one(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    manifest = json.loads((path / folder.MANIFEST).read_text())
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["sub/b.bin"]["bytes"] == 1000
    DAMAGES["a flipped bit"](path)
    with pytest.raises(CheckpointError, match=r"b\.bin is damaged"):
        folder.verify(path)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [((2, 20), [20, 40, 50]), ((1, 0), [50]), ((1, 0, 20), [20, 50])],
)
def test_retention(tmp_path: Path, policy: tuple[int, ...], kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    folder.retain(tmp_path, *policy)
    assert folder.steps(tmp_path) == kept


@pytest.mark.parametrize(
    ("kill", "content"), [(2, "first"), (3, "second")], ids=["before the rename", "after"]
)
def test_a_kill_while_a_step_is_saved_again_loses_neither(
    tmp_path: Path, kill: int, content: str
) -> None:
    write(tmp_path, 5, "first")
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
    assert ((found / "a.bin").read_text(), messages) == (content, [])
    write(tmp_path, 7)
    assert folder.steps(tmp_path) == [5, 7]
    assert not list(tmp_path.glob(".*_step_*"))
