"""Where a number was measured, without a path or a host name in it."""

from __future__ import annotations

import json
import platform
import subprocess

from geneformer_mcore.metrics import provenance


def test_it_names_machine_versions_and_commit() -> None:
    found = provenance.provenance()
    assert set(found) == {"machine", "versions", "commit"}
    assert "cores" in found["machine"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["megatron-core"] == "0.16.1"
    assert platform.node() not in json.dumps(found)
    assert str(provenance.PROJECT) not in json.dumps(found)


def test_without_git_the_commit_is_unknown(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.commit() == "unknown"


def test_changes_are_told(monkeypatch) -> None:
    answers = {"rev-parse": "0123456789ab", "status": " M setup.py"}
    monkeypatch.setattr(provenance, "_git", lambda *arguments: answers[arguments[0]])
    assert provenance.commit() == "0123456789ab+changes"
    answers["status"] = ""
    assert provenance.commit() == "0123456789ab"
