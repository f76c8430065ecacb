"""The Dockerfile: what is pinned, who runs it, and what docker is given."""

from __future__ import annotations

import re

from tests.dockerfile import instructions, is_ignored, sources
from tests.rules.sources import ROOT

DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
TEXT = "".join(f"{word} {value}\n" for word, value in DOCKERFILE)


NEEDED = (
    r"^ARG BASE=\S+:(?!latest)\S+\nFROM \$\{BASE\}$",
    r'^SHELL \["/bin/bash", "-euo", "pipefail", "-c"\]$',
    r"^WORKDIR /",
    r"^USER [1-9]\d*:\d+$(?![\s\S]*^USER)",
)
REFUSED = (
    r"\bsudo\b",
    r"^ADD ",
    r"^(CMD|ENTRYPOINT) [^\[]",
    r"pip install (?!--no-cache-dir)",
    r"^FROM (?!\$\{BASE\}$)",
    r"^(ENV|ARG) .*(?i:TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY)",
    r"apt-get install (?!.*--no-install-recommends)",
    r"apt-get (?!.*rm -rf /var/lib/apt/lists)",
)


def test_what_it_says() -> None:
    for pattern in NEEDED:
        assert re.search(pattern, TEXT, re.MULTILINE), pattern
    for pattern in REFUSED:
        assert not re.search(pattern, TEXT, re.MULTILINE), pattern


def test_what_docker_is_given() -> None:
    given = [
        *sources(DOCKERFILE),
        "geneformer_mcore/model/bert.py",
        "launch/x.py",
        "configs/x.yaml",
    ]
    caches = [".mypy_cache/x", "launch/__pycache__/x.pyc", "image/lists/constraints.txt"]
    assert len(given) >= 7
    for path in given:
        assert not is_ignored(path.rstrip("/"), ROOT / ".dockerignore"), path
    for path in [".git/config", ".venv/bin/python", "build/x", "runs/x/outcome.json", *caches]:
        assert is_ignored(path, ROOT / ".dockerignore"), path
    assert all((ROOT / path).exists() for path in sources(DOCKERFILE))
