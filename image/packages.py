#!/usr/bin/env python
"""What the base image lacks of what this project needs, and what must stay as it is in it.

    packages of the image  --+--> constraints.txt   theirs: torch, numpy, all that we do not know
    requirements.lock      --+                      ours, exactly, for what the image lacks
    setup.py               -----> needed.txt        what we ask for

python image/packages.py [--check] FOLDER

The image's torch and what was built against it (Transformer Engine, apex, DALI, by the C interfaces
of that torch and that numpy) are on no index: pip must neither replace nor update them. What is in
the image and in requirements.lock, such as pandas, stays too, unless one of ours cannot do with it.
With --check, after pip: fails if a package that must stay has changed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS, NEEDED, KEPT = "constraints.txt", "needed.txt", "kept.txt"
IN_EVERY_BASE = ("torch", "numpy")
"""A base without them is none of NVIDIA's: pip would bring a torch of its own."""
HELD = re.compile(r"torch|numpy|setuptools|wheel|nvidia-.*|transformer-engine.*|apex|.*triton.*")
"""Of what requirements.lock names too, this stays as it is in the image: binary interfaces."""


def main() -> int:
    """Exit codes: 0, 1 a package has changed, 2 not a base to build on."""
    parser = argparse.ArgumentParser(description="What the base image lacks; see the file's head.")
    parser.add_argument("folder", type=Path, help="where constraints.txt and needed.txt lie")
    parser.add_argument("--check", action="store_true", help="that no package has changed")
    arguments = parser.parse_args()
    present = installed()
    if arguments.check:
        return _check(lines_of(arguments.folder / KEPT), present)
    missing = [name for name in IN_EVERY_BASE if name not in present]
    if missing:
        print(f"error: the base image has no {', '.join(missing)}", file=sys.stderr)
        return 2
    locked = lines_of(ROOT / "requirements.lock")
    ours = [line for line in locked if name_of(line) not in present]
    free = {name for name in map(name_of, locked) if not HELD.fullmatch(name)}
    kept = [f"{name}=={found}" for name, found in sorted(present.items()) if name not in free]
    # By name where it stays: torch 2.10.0a0 is not "torch>=2.10", and yet it is that.
    needed = [
        name_of(line) if HELD.fullmatch(name_of(line)) else line
        for line in requirements(ROOT / "setup.py")
    ]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in ((KEPT, kept), (CONSTRAINTS, [*kept, *ours]), (NEEDED, needed)):
        (arguments.folder / name).write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )
    return 0


def installed() -> dict[str, str]:
    """{normalised name: version} of all packages of this interpreter, pip itself left out."""
    # The first of a name is the one that is imported.
    found: dict[str, str] = {}
    for each in distributions():
        name = each.metadata["Name"]
        if name and name_of(name) != "pip":
            found.setdefault(name_of(name), each.version)
    return found


def name_of(requirement: str) -> str:
    """The normalised name of the package that a requirement begins with."""
    match = re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def requirements(setup_file: Path) -> list[str]:
    """install_requires of a setup.py, which is read and not run."""
    for node in ast.walk(ast.parse(setup_file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{setup_file} has no install_requires")


def lines_of(path: Path) -> list[str]:
    """Lines that say something."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _check(kept: Iterable[str], present: dict[str, str]) -> int:
    changed = [line for line in kept if present.get(name_of(line)) != line.partition("==")[2]]
    for line in changed:
        now = present.get(name_of(line), "gone")
        print(f"error: {line} of the base image is now {now}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
