"""Words that all packages share: a block of cells, optional packages, errors naming parameters."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore import backends, exit_codes
from geneformer_mcore.errors import DataError, MissingBackendError, naming_options
from geneformer_mcore.types import CellViews, RaggedCells

CELLS = RaggedCells(
    np.array([0, 7, 9, 0, 8, 0, 6, 5], np.uint16),
    np.array([0, 3, 5, 8]),
    np.array([11, 12, 13], np.uint64),
)


def as_lists(cells: RaggedCells) -> list[list[int]]:
    """The tokens of each cell."""
    bounds = zip(cells.offsets[:-1], cells.offsets[1:], strict=True)
    return [cells.tokens_T[start:stop].tolist() for start, stop in bounds]


def test_the_first_cells_and_cells_that_lie_anywhere() -> None:
    first = CELLS.first(2)
    assert as_lists(first) == [[0, 7, 9], [0, 8]]
    assert (first.keys_N.tolist(), len(first.tokens_T)) == ([11, 12], 5)
    assert as_lists(CELLS.first(9)) == as_lists(CELLS)
    # In another order, and one of them cut.
    views = CellViews(CELLS.tokens_T, CELLS.offsets[:-1], CELLS.lengths, CELLS.keys_N)
    some = views.part(np.array([2, 0]))
    cut = CellViews(some.tokens_T, some.starts_N, np.array([2, 3]), some.keys_N)
    assert as_lists(cut.ragged()) == [[0, 6], [0, 7, 9]]
    assert cut.ragged().keys_N.tolist() == [13, 11]


def test_another_apex_is_not_taken_for_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(MissingBackendError, match="PyPI's project of the same name"):
        backends.is_available("apex")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert backends.is_available("apex")
    # Python's own look for a part of a missing package would raise ModuleNotFoundError.
    assert not backends.is_available("no_such_package_of_nvidia.dali")


MESSAGE = 'a "b=c": `counts_layer=`, `dtype="float32"`, `top=3`, `allow_normalised=True`, `X`.'
ERROR = DataError(MESSAGE)


def test_parameters_are_options_in_a_command_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        # As it comes from a worker process.
        raise DataError(f"x: {pickle.loads(pickle.dumps(ERROR))}")

    for options, layer in (({}, "--counts-layer"), ({"counts_layer": "--layer"}, "--layer")):
        with pytest.raises(SystemExit, match="2"):
            exit_codes.run(fails, **options)
        assert capsys.readouterr().err == (
            f'error: x: a "b=c": {layer}, --dtype float32, --top 3, --allow-normalised, `X`.\n'
        )
    assert str(ERROR) == MESSAGE
    with naming_options():
        assert ERROR.names_parameter
    assert not DataError("`X` and a=b").names_parameter
