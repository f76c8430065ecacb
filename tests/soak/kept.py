"""Results of an earlier start that still hold: those of the same commit."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any


def commit(tree: Path) -> str:
    """Of the work tree; empty if it has changes, or there is no repository: nothing is known of it
    from before."""
    printed = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain")):
        ended = subprocess.run(
            ["git", *command], cwd=tree, capture_output=True, text=True, check=False
        )
        printed.append(ended.stdout.strip() if ended.returncode == 0 else "unknown")
    return printed[0] if not printed[1] else ""


class Results:
    """{name: result} of one commit, in a file if one is given."""

    def __init__(self, file: Path | None, commit: str) -> None:
        found = json.loads(file.read_text()) if file is not None and file.exists() else {}
        is_same = bool(commit) and found.get("commit") == commit
        self.of: dict[str, dict[str, Any]] = found["results"] if is_same else {}
        self._file, self._commit, self._lock = file, commit, threading.Lock()

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Writes it down at once."""
        with self._lock:
            self.of[name] = result
            if self._file is not None:
                text = json.dumps({"commit": self._commit, "results": self.of}, indent=1)
                part = self._file.with_name(f".{self._file.name}.part")
                part.write_text(text + "\n")
                part.replace(self._file)
