"""launch/cache_store.py: a node's own copy of a store, and a message where no place is named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.support import commands

start = partial(commands.run, "launch/cache_store.py")


def test_the_copy_is_there_and_is_not_made_twice(store: Path, tmp_path: Path) -> None:
    settings = (f"data.store={store}", "data.seq_length=100", f"data.cache_dir={tmp_path}")
    content = json.loads((store / "manifest.json").read_text())["content_hash"]
    copy = tmp_path / content[:16] / "tokens.bin"
    ended = start(*settings)
    assert ended.returncode == 0, ended.stderr
    assert f"{store}: in {tmp_path}, " in ended.stdout
    made = copy.stat()
    assert made.st_size > 0
    assert start(*settings).returncode == 0
    assert copy.stat().st_mtime_ns == made.st_mtime_ns


def test_no_folder(store: Path) -> None:
    ended = start(f"data.store={store}")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: data.cache_dir names no folder: give it one on this node's own disk.\n"
    )
