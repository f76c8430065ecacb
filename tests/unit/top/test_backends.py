"""Where other libraries keep their caches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from geneformer_mcore import backends

NAMES = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR")


@pytest.mark.parametrize(
    ("home", "given", "expected"),
    [("fine", "", ""), ("/proc/no", "", "own"), ("file/no", "mine", "mine"), (None, "", "own")],
)
def test_caches_go_where_one_can_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    home: str | None,
    given: str,
    expected: str,
) -> None:
    """No home: that of a user whom the system does not know."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home) if home else "~")
    for name in NAMES:  # set first, so that they are restored
        monkeypatch.setenv(name, given)
        if not given:
            monkeypatch.delenv(name)
    at_exit: list[str] = []
    monkeypatch.setattr(backends.atexit, "register", lambda _, folder, **__: at_exit.append(folder))
    backends.use_writable_caches()
    for name in NAMES:
        found = os.environ.get(name, "")
        assert found == (at_exit[0] if expected == "own" else expected)
        assert expected != "own" or os.access(found, os.W_OK)
    assert os.listdir(tmp_path) == ["file"]
    for folder in at_exit:
        os.rmdir(folder)
