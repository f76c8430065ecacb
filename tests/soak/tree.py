"""What is known of a work tree: the commit for which results of an earlier start still hold."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(tree: Path) -> str:
    """Of the work tree; empty if it has changes, or there is no repository: nothing is known of it
    from before."""
    said = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain")):
        ended = subprocess.run(
            ["git", *command], cwd=tree, capture_output=True, text=True, check=False
        )
        said.append(ended.stdout.strip() if ended.returncode == 0 else "unknown")
    return said[0] if not said[1] else ""
