"""Numbers that are kept: one JSON file, written beside its place and renamed into it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError


def check_place(path: Path) -> None:
    """Makes the folder of `path`. Raises DataError if no file can be written there: to be asked
    before what takes minutes to measure."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asking for permissions would not do: root has them all, on a read-only disk too.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that can be "
            "written."
        ) from None


def save(path: Path, numbers: dict[str, Any]) -> None:
    """Writes `numbers` to `path`. Raises DataError where it cannot."""
    check_place(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(numbers, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}).") from None
