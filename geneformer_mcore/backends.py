"""Which optional packages are here: one question, asked in one place (floor 1).

Nothing is imported to answer it, so asking costs microseconds and has no side effects.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import MissingBackendError

INSTALL_HINTS = {
    "transformer_engine": 'pip install "geneformer_mcore[gpu]" on a machine with an NVIDIA GPU',
    "apex": "use NVIDIA's PyTorch container, or build NVIDIA's apex from source; "
    "the package called `apex` on PyPI is another project",
    "nvidia.dali": "pip install nvidia-dali-cuda130, or set data.loader=thread",
    "scanpy": 'pip install "geneformer_mcore[eval]"',
    "sklearn": 'pip install "geneformer_mcore[eval]"',
    "cellxgene_census": 'pip install "geneformer_mcore[census]", or give an Experiment by `uri=`',
}


def is_available(name: str) -> bool:
    """Whether the package `name` can be imported here. For apex, whether it is NVIDIA's."""
    if name == "apex":
        return _is_nvidia_apex()
    parent = name.rpartition(".")[0]
    # To look for `nvidia.dali`, Python imports `nvidia`: a bare folder shared by NVIDIA's packages.
    return (not parent or is_available(parent)) and find_spec(name) is not None


def require(name: str) -> None:
    """Raises MissingBackendError with an install hint unless `name` is available."""
    if not is_available(name):
        hint = INSTALL_HINTS.get(name, f"pip install {name}")
        raise MissingBackendError(f"`{name}` is needed here and is not installed. Remedy: {hint}.")


def ignore_known_warnings() -> None:
    """Keeps Megatron-Core's remarks about itself off the console: what is absent (we log that as
    the run's backends), its deprecations, and its look at the gradient of a view."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


def use_writable_caches() -> None:
    """Where nothing can be cached in the home (it is not known, or read-only), numba and matplotlib
    cache in a temporary folder of this process: else umap fails where its installation cannot be
    written to either. To be called before they are imported."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        if place.is_absolute():
            nearest = next(each for each in (place, *place.parents) if each.exists())
            with tempfile.TemporaryFile(dir=nearest):
                return
    except OSError:
        pass
    folder = tempfile.mkdtemp(prefix="geneformer_mcore_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(name, folder)


def describe() -> dict[str, str]:
    """Versions of the packages a run's numbers depend on; "absent" where one is not here."""
    names = ("torch", "megatron-core", "transformer-engine", "tiledbsoma", "numpy")
    return {name: _version(name) for name in names} | {
        "apex": "present" if is_available("apex") else "absent"
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


def _is_nvidia_apex() -> bool:
    # PyPI's `apex` is a web framework: it has no `optimizers`, and must never reach Megatron-Core,
    # which would take its presence for NVIDIA's fused kernels.
    spec = find_spec("apex")
    if spec is None:
        return False
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        raise MissingBackendError(
            "the installed package `apex` is not NVIDIA's apex but PyPI's project of the same "
            "name, and Megatron-Core would mistake it for NVIDIA's. Remedy: pip uninstall apex."
        )
    return True


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on its first call; it holds no lock of the interpreter meanwhile.

    Floating point stays strict (no reassociation, no fused multiply-add): token order is exact.
    Division by zero gives infinity or NaN, not an exception, whose test would forbid SIMD.
    """
    # Only here: numba takes half a second to import.
    from numba import njit

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        # numba finds no folder it may write a cache to: a read-only installation without a home.
        return njit(**options)(function)
