"""Step folders: staged, verified by hash, renamed when complete and on the disk.

    checkpoints/.staging_step_0000000100/   being written
    checkpoints/step_0000000100/            complete: manifest.json names every file's size and hash
    checkpoints/.replaced_step_0000000100/  an earlier one of that step, until the new one is there
    checkpoints/.removed_step_0000000100/   being removed
    checkpoints/damaged_step_0000000100/    failed verification, never read again
    checkpoints/latest                      the newest one's name, for people

So a kill at any instant leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.io.files import (
    file_digest,
    read_sealed,
    replacing,
    sync,
    sync_tree,
    write_sealed,
)
from geneformer_mcore.io.schema import Count, Digest, as_type

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{10})")


@dataclass(frozen=True)
class _File:
    """A file as it was written."""

    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class _Manifest:
    """manifest.json without its checksum; files: {path within the folder: ...}."""

    step: Count
    files: dict[str, _File]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:010d}"


def make_staging(root: Path, step: int) -> Path:
    """An empty folder for the checkpoint of `step`. Leftovers of kills are removed."""
    root.mkdir(parents=True, exist_ok=True)
    clear(root)
    staging = root / f".staging_step_{step:010d}"
    staging.mkdir()
    return staging


def clear(root: Path) -> None:
    """Remove leftovers of a kill or a failed save."""
    _put_back(root)
    for leftover in root.glob(".*_step_*"):
        shutil.rmtree(leftover)


def commit(staging: Path, root: Path, step: int) -> Path:
    """Make the staging folder the checkpoint of `step`, on the disk before it has the name."""
    files = {
        path.relative_to(staging).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    write_sealed(staging / MANIFEST, {"step": step, "files": files})
    sync_tree(staging)
    final = step_folder(root, step)
    replaced = root / f".replaced_{final.name}"
    if final.exists():  # the same step again, after an earlier end at it
        final.rename(replaced)
    staging.rename(final)
    sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _point(root, final.name)
    return final


def _point(root: Path, name: str) -> None:
    # The pointer is optional: the next write that matters reports a full disk.
    with contextlib.suppress(OSError), replacing(root / LATEST, alone=True) as pointer:
        pointer.write_text(name + "\n", encoding="utf-8")


def _put_back(root: Path) -> None:
    """Restore the name of a checkpoint that a killed save had moved aside for a newer one."""
    for replaced in root.glob(".replaced_step_*"):
        final = root / replaced.name.removeprefix(".replaced_")
        if not final.exists():
            replaced.rename(final)


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending, not verified."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for m in (_STEP.fullmatch(path.name) for path in root.iterdir()) if m)


def verify(folder: Path) -> None:
    """Raise CheckpointError for the first file that is missing, unreadable on its disk, or changed;
    OSError if that is unknown (no permission, a network)."""
    for name, expected in _files(folder):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing from the checkpoint.")
        size = path.stat().st_size
        if size != expected.bytes or _hash_on_disk(path) != expected.sha256:
            raise CheckpointError(
                f"{path} is damaged: {size} bytes where {expected.bytes} were written, "
                "or other bytes than were written."
            )


def _files(folder: Path) -> Iterator[tuple[str, _File]]:
    """(name, size and hash) of every file. CheckpointError for a wrong or damaged manifest."""
    path = folder / MANIFEST
    if path.exists():
        path.read_bytes()  # read_sealed would take an OSError for damage
    content = read_sealed(path)
    if content is None:
        raise CheckpointError(f"{path} is missing or damaged.")
    manifest = as_type(content, _Manifest, path, "put a good copy back", CheckpointError)
    if step_folder(folder.parent, manifest.step).name != folder.name:
        raise CheckpointError(f"{path} is of step {manifest.step}, and the folder is not.")
    for name, expected in manifest.files.items():
        pure = PurePosixPath(name)
        is_within = str(pure) == name and pure.parts and not pure.is_absolute()
        if not is_within or ".." in pure.parts or _is_linked(folder, pure):
            raise CheckpointError(f"{path} names {name!r}, which is no file of this folder.")
        yield name, expected


def _is_linked(folder: Path, name: PurePosixPath) -> bool:
    """Whether a folder on the way to the file is a symbolic link."""
    return (folder / name).parent.resolve() != folder.resolve() / name.parent


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """The latest valid checkpoint, or None if there never was one, and a line for each damaged one,
    which is renamed. Raises CheckpointError if there are only damaged ones."""
    messages = []
    _put_back(root)
    for step in reversed(steps(root)):
        folder = step_folder(root, step)
        try:
            verify(folder)
        except CheckpointError as error:
            aside = root / f"damaged_{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            _rename_aside(folder, aside)
            messages.append(f"{error} It is now called {aside.name}.")
        else:
            return folder, messages
    damaged = sorted(path.name for path in root.glob("damaged_step_*"))
    if damaged:
        raise CheckpointError(
            f"{root} holds {len(damaged)} checkpoint(s), and none is as it was written: "
            f"{', '.join(damaged)}. Put a good copy back as step_NNNNNNNNNN, or start a new run "
            "with another run.dir."
        )
    return None, messages


def retain(root: Path, keep_last: int, keep_every: int, best: int | None = None) -> None:
    """Remove all but the newest `keep_last`, multiples of `keep_every` (0: none), and `best`."""
    for step in steps(root)[:-keep_last]:
        if step != best and not (keep_every and step % keep_every == 0):
            remove(step_folder(root, step))


def remove(folder: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a kill leaves no half checkpoint."""
    gone = folder.with_name(f".removed_{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _hash_on_disk(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(f"{path} is damaged: its disk cannot read it.") from None


def _rename_aside(folder: Path, aside: Path) -> None:
    try:
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is damaged and cannot be set aside as {aside.name}: {error.strerror}. Make "
            "its folder writable, and start the same command again."
        ) from None
