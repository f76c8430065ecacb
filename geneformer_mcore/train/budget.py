"""From settings to how cells are packed."""

from __future__ import annotations

from geneformer_mcore.config import Config
from geneformer_mcore.config.derive import token_budget
from geneformer_mcore.feed.loader import Budget


def budget(config: Config) -> Budget | None:
    """How cells are packed; None if they are padded."""
    if not config.data.packing:
        return None
    parallel = config.parallel
    # The interleaved schedule runs micro batches in groups of as many as there are stages.
    return Budget(token_budget(config), parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
