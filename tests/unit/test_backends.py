"""Optional packages: another project's apex must not be taken for NVIDIA's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from geneformer_mcore import backends
from geneformer_mcore.errors import MissingBackendError


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, the first that is found."""
    folder = tmp_path / "apex"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return folder


def test_nvidias_apex(apex: Path) -> None:
    (apex / "optimizers").mkdir()
    assert backends.is_available("apex")


def test_another_apex(apex: Path) -> None:
    with pytest.raises(MissingBackendError, match="PyPI's project of the same name"):
        backends.is_available("apex")
