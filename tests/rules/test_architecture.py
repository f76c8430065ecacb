"""The links from the pages to lines of code lead to what they name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_links_lead_to_what_they_name(repository: Path) -> None:
    ended = subprocess.run(
        [sys.executable, repository / "tests" / "doc_links.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
