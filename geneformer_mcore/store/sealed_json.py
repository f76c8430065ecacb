"""Small JSON files that tell when they were changed.

content  ->  + SHA-256 of its canonical form  ->  written beside, renamed  ->  read: whole, or None
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def checksum_of(content: Any) -> str:
    """SHA-256, as hex, of plain JSON content in its canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with its checksum, whole or not at all. Raises OSError where it cannot."""
    text = json.dumps(content | {"checksum": checksum_of(content)})
    # Several processes may write one file: each has a name of its own for the time being.
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None if it is not there, not whole or was changed since."""
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return content if checksum == checksum_of(content) else None
