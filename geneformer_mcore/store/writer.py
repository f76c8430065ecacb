"""The last step: from finished units to a published store.

units  ->  rows (see merge)  ->  vocabulary.json, manifest.json  ->  rename
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from geneformer_mcore import __version__
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.files import describe_files
from geneformer_mcore.store.layout import VOCABULARY_FILE, Manifest
from geneformer_mcore.store.merge import Merge
from geneformer_mcore.store.plan import Recipe
from geneformer_mcore.store.progress import Progress, no_progress
from geneformer_mcore.store.source_report import SourceReport, sum_skipped
from geneformer_mcore.store.sources import Refusal
from geneformer_mcore.store.split import SPLITS
from geneformer_mcore.store.staging import StagedFolder
from geneformer_mcore.store.unit_file import remove_others


def write_store(
    staged: StagedFolder,
    merge: Merge,
    recipe: Recipe,
    reports: Sequence[SourceReport] = (),
    refusals: Sequence[Refusal] = (),
    progress: Progress = no_progress,
) -> Manifest:
    """Merges all units into the store and publishes it.

    Raises DataError if there is no cell, or one twice.
    """
    skipped = sum_skipped(report.skipped for report in reports)
    cells_of_split = merge.cells_of_split
    if not sum(cells_of_split.values()):
        remove_others(staged.units, [])
        raise DataError(
            f"no cell is left to store; skipped: {skipped or 'none'}. Remedy: check that the "
            "inputs hold counts of genes that are in the vocabulary."
        )
    # Rows take no more room than units, whose text is not compressed.
    staged.check_room(sum(unit.num_bytes for unit in merge.units.values()))
    content_hash = merge.write_rows(staged.store, progress)
    recipe.vocabulary.save(staged.store / VOCABULARY_FILE)
    manifest = Manifest(
        cells=sum(cells_of_split.values()),
        tokens=sum(unit.tokens for unit in merge.units.values()),
        rows=_row_ranges(cells_of_split),
        seq_length=recipe.seq_length,
        content_hash=content_hash,
        vocabulary_hash=recipe.vocabulary.checksum,
        labels={name: str(kind) for name, kind in merge.kinds.items()},
        split=recipe.split_rule.describe(),
        sources=[asdict(report) for report in reports],
        skipped=skipped,
        versions=_versions(),
        refused=[refusal.describe() for refusal in refusals],
        files=describe_files(staged.store),
    )
    manifest.save(staged.store)
    staged.publish()
    return manifest


def _row_ranges(cells_of_split: dict[str, int]) -> dict[str, list[int]]:
    stops = np.cumsum([cells_of_split[split] for split in SPLITS]).tolist()
    return {
        split: [stop - cells_of_split[split], stop]
        for split, stop in zip(SPLITS, stops, strict=True)
    }


def _versions() -> dict[str, str]:
    found = {"geneformer_mcore": __version__}
    for name in ("tiledbsoma", "numpy", "numba", "anndata", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
