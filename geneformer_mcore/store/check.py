"""Full check of a store against its manifest.

all rows, span by span  ->  each cell sound?  ->  obs fits tokens?  ->  totals, content hash
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.layout import OBS, TOKENS, ContentHash
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.soma_io import SomaReader
from geneformer_mcore.types import CLS, NUM_SPECIALS, RaggedCells

_ROWS = 4096
_MAX_PROBLEMS = 20


def check_store(path: str | Path, progress: Progress = no_progress) -> list[str]:
    """Reads all of the store at `path`; the problems found, none if it is sound.

    Checked: all that opening checks; every byte's checksum; each cell: [CLS] first, at least one
    gene, at most seq_length tokens, ids of the vocabulary, no gene twice; obs: n_tokens, split,
    cell_key; cells and tokens in all; the content hash.
    """
    try:
        with TokenStore.open(path) as store, SomaReader(Path(path)) as soma:
            return _StoreCheck(store, soma).run(progress)
    except DataError as error:
        return [str(error)]


class _StoreCheck:
    def __init__(self, store: TokenStore, soma: SomaReader) -> None:
        self._store, self._soma = store, soma
        self._hasher = ContentHash()
        self._tokens = 0
        self._problems: list[str] = []
        self._unsound: Counter[str] = Counter()
        self._first_row: dict[str, int] = {}

    def run(self, progress: Progress) -> list[str]:
        num_cells = len(self._store)
        for start in range(0, num_cells, _ROWS):
            stop = min(start + _ROWS, num_cells)
            try:
                self._check_span(start, stop)
            except DataError as error:
                self._problems.append(str(error))
                if len(self._problems) >= _MAX_PROBLEMS:
                    self._problems.append("... and more; the check ended here.")
                    return self._problems
            progress("checking rows", stop, num_cells)
        self._problems += [
            f"{self._store.path}: {number:,} cells {name}, the first at row "
            f"{self._first_row[name]:,}."
            for name, number in self._unsound.items()
        ]
        # After an unreadable span, totals would only repeat that rows are missing.
        if not self._problems:
            self._check_totals()
        return self._problems

    def _check_span(self, start: int, stop: int) -> None:
        cells = self._store.read(start, stop)
        obs = self._soma.read(OBS, start, stop, self._soma.columns(OBS))
        self._hasher.update(obs)
        self._hasher.update(self._soma.read(TOKENS, start, stop, [TOKENS]))
        self._tokens += len(cells.tokens_T)
        found = self._wrong_tokens(cells) | self._wrong_obs(start, cells, obs)
        for name, is_wrong_N in found.items():
            wrong = np.flatnonzero(is_wrong_N)
            if len(wrong):
                self._unsound[name] += len(wrong)
                self._first_row.setdefault(name, start + int(wrong[0]))

    def _wrong_tokens(self, cells: RaggedCells) -> dict[str, np.ndarray]:
        """{problem: bool [N], the cells that have it}."""
        lengths, starts = cells.lengths, cells.offsets[:-1]
        cell_T = np.repeat(np.arange(len(cells)), lengths)
        is_first_T = np.zeros(len(cells.tokens_T), dtype=bool)
        is_first_T[starts[lengths > 0]] = True
        tokens_T = cells.tokens_T
        beyond_T = tokens_T >= self._store.vocabulary.size
        special_T = ~is_first_T & (tokens_T < NUM_SPECIALS)
        codes = np.sort(cell_T * 65_536 + tokens_T)
        repeated = codes[1:][np.diff(codes) == 0] // 65_536

        def cells_of(rows: np.ndarray) -> np.ndarray:
            return np.bincount(rows, minlength=len(cells)) > 0

        longest = self._store.manifest.seq_length
        return {
            "do not start with [CLS]": cells_of(cell_T[is_first_T & (tokens_T != CLS)]),
            "hold token ids beyond the vocabulary": cells_of(cell_T[beyond_T]),
            "hold special tokens among the genes": cells_of(cell_T[special_T]),
            "hold a gene twice": cells_of(repeated),
            "hold no gene": lengths < 2,
            f"are longer than seq_length {longest}": lengths > longest,
        }

    def _wrong_obs(self, start: int, cells: RaggedCells, obs: pa.Table) -> dict[str, np.ndarray]:
        datasets, names = obs["dataset_id"].to_pylist(), obs["cell_id"].to_pylist()
        rows = np.arange(start, start + len(cells))
        split_of_row = np.empty(len(rows), dtype=object)
        for split, (first, stop) in self._store.manifest.rows.items():
            split_of_row[(rows >= first) & (rows < stop)] = split
        return {
            "have another n_tokens in obs": obs["n_tokens"].to_numpy() != cells.lengths,
            "have another split in obs than their rows": obs["split"].to_numpy() != split_of_row,
            "have a cell_key that is not their names'": cell_keys(datasets, names) != cells.keys_N,
        }

    def _check_totals(self) -> None:
        manifest = self._store.manifest
        if self._tokens != manifest.tokens:
            self._problems.append(
                f"{self._store.path}: {self._tokens:,} tokens in all, the manifest says "
                f"{manifest.tokens:,}."
            )
        found = self._hasher.hexdigest()
        if found != manifest.content_hash:
            self._problems.append(
                f"{self._store.path}: the content hash is {found[:12]}..., the manifest says "
                f"{manifest.content_hash[:12]}...: rows were changed after the store was built."
            )
