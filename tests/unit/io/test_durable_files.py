"""What a power cut must not take away: files are on the disk before they have their name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.metrics.sinks import drop_later_steps
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.ingest.staging import StagedFolder
from geneformer_mcore.store.layout import MANIFEST_FILE
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.types import RaggedCells

Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """("synced", path) and ("named", new path), in order, of all that is synced and renamed."""
    found: Calls = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        found.append(("synced", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted(do: Any) -> Any:
        def named(source: Any, target: Any, **more: Any) -> None:
            do(source, target, **more)
            found.append(("named", str(target)))

        return named

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    return found


def synced_before(calls: Calls, name: Path, then: Path | None = None) -> set[str]:
    """What was synced before something was called `name`; and after it, `then`."""
    end = calls.index(("named", str(name)))
    assert then is None or ("synced", str(then)) in calls[end:]
    return {path for what, path in calls[:end] if what == "synced"}


def filled(folder: Path) -> set[str]:
    """Files in `folder` and in a folder of it; all paths that must be synced."""
    (folder / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (folder / name).write_text(name)
    return {str(folder), *(str(path) for path in folder.rglob("*"))}


def test_checkpoint(tmp_path, calls) -> None:
    staging = checkpoints.make_staging(tmp_path, 3)
    paths = filled(staging) | {str(staging / checkpoints.MANIFEST)}
    final = checkpoints.commit(staging, tmp_path, 3)
    assert paths <= synced_before(calls, final, then=tmp_path)


def test_store(tmp_path, calls) -> None:
    target = tmp_path / "store"
    with StagedFolder(target) as staged:
        paths = filled(staged.store)
        (staged.store / MANIFEST_FILE).write_text("{}")
        staged.publish()
    assert paths <= synced_before(calls, target, then=tmp_path)


class OneCell:
    """A source of one cell (flat.Copyable)."""

    def __len__(self) -> int:
        return 1

    def read(self, start: int, stop: int) -> RaggedCells:
        tokens = np.array([0, 7], np.uint16)
        return RaggedCells(tokens, np.array([0, 2]), np.array([5], np.uint64))


def test_flat_copy(tmp_path, calls) -> None:
    copy = local_cache.ensure(OneCell(), "c" * 64, 2, tmp_path)
    partial = copy.folder.with_name(f".{copy.folder.name}.partial")
    paths = {str(partial), *(str(partial / path.name) for path in copy.folder.iterdir())}
    assert paths <= synced_before(calls, copy.folder)


def test_outcome(tmp_path, calls) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    name = tmp_path / "outcome.json"
    assert synced_before(calls, name) == {str(tmp_path / ".outcome.json.partial")}
    folder.close(0, "done")


def test_metrics_of_earlier_steps(tmp_path, calls) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    drop_later_steps(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    assert synced_before(calls, path) == {str(tmp_path / ".metrics.jsonl.partial")}
