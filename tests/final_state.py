"""What two runs are compared by: digests of all that their next step would depend on."""

from __future__ import annotations

import json
from pathlib import Path

from geneformer_mcore.checkpoint import folder as checkpoints


def final_state(run: Path) -> dict[str, str]:
    """{file of the last checkpoint: its SHA-256}, of all that the next step would depend on."""
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    root = run / "checkpoints"
    last = checkpoints.step_folder(root, checkpoints.steps(root)[-1])
    files = json.loads((last / checkpoints.MANIFEST).read_text())["files"]
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.endswith((".distcp", ".npz", "common.pt"))
    }
