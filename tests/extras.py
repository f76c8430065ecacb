"""Every extra of setup.py beside requirements.lock: installed, checked and imported.

    .venv + the extra's packages, with the lock as constraints  ->  pip check  ->  import each
                                                                ->  the tests that need them

Each in an environment of its own in a temporary folder, which sees the packages of .venv.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "eval": ("scanpy", "sklearn"),
    "census": ("cellxgene_census",),
    "bench": ("tiledbsoma_ml", "scdataset", "bionemo.scdl", "datasets", "transformers"),
}
TESTS = {"census": ("tests/unit/io/test_census.py", "-k", "real_package or release")}
SKIPPED = {"gpu": "its packages need CUDA 13", "dev": "requirements.lock is made of it"}


def packages_of(extra: str) -> list[str]:
    """As setup.py names them."""
    found = [Requirement(each) for each in requires("geneformer_mcore") or []]
    mine = [each for each in found if each.marker and each.marker.evaluate({"extra": extra})]
    return [f"{each.name}{each.specifier}" for each in mine]


def check(extra: str) -> None:
    """Raises CalledProcessError where it does not install, fit or import."""
    with tempfile.TemporaryDirectory(prefix="extra_") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        theirs = sysconfig.get_path("purelib")  # with the .pth files in it
        borrowed = f"{ROOT}\nimport site; site.addsitedir({theirs!r})\n"
        (Path(folder) / "lib" / version / "site-packages" / "borrowed.pth").write_text(borrowed)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        lock = ["-c", ROOT / "requirements.lock"]
        tests = [python, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        for command in (
            [*pip, "install", "-q", *lock, "setuptools", *packages_of(extra)],
            [*pip, "check"],
            [python, "-W", "ignore", "-c", f"import {', '.join(MODULES[extra])}"],
            *([[*tests, *TESTS[extra]]] if extra in TESTS else []),
        ):
            subprocess.run(command, cwd=ROOT, check=True)
    print(f"{extra}: {', '.join(MODULES[extra])}: installed beside the lock, and imported")


def main() -> None:
    for extra in sys.argv[1:] or MODULES:
        check(extra)
    for extra, reason in SKIPPED.items():
        print(f"{extra}: skipped, {reason}")


if __name__ == "__main__":
    main()
