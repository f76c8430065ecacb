"""launch/cache_store.py: a node's own copy of a store, and a message where no place is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def start(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/cache_store.py", *arguments]
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_copy_is_there_and_is_not_made_twice(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    settings = (f"data.store={store}", "data.seq_length=100", f"data.cache_dir={tmp_path}")
    content = json.loads((store / "manifest.json").read_text())["content_hash"]
    copy = tmp_path / content[:16] / "tokens.bin"
    ended = start(repository, *settings)
    assert ended.returncode == 0, ended.stderr
    assert f"{store}: in {tmp_path}, " in ended.stdout
    made = copy.stat()
    assert made.st_size > 0
    assert start(repository, *settings).returncode == 0
    assert copy.stat().st_mtime_ns == made.st_mtime_ns


def test_no_folder(repository: Path, store: Path) -> None:
    ended = start(repository, f"data.store={store}")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: data.cache_dir names no folder: give it one on this node's own disk.\n"
    )
