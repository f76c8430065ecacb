"""The package and what it needs. Exact versions, for a repeatable set-up: requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "geneformer_mcore/version.py").read_text(encoding="utf-8")
)
assert VERSION is not None

setup(
    name="geneformer_mcore",
    version=VERSION.group(1),
    description="Pretraining of Geneformer, a BERT over ranked genes of cells, on Megatron-Core",
    license="Apache-2.0",
    packages=find_packages(include=["geneformer_mcore", "geneformer_mcore.*"]),
    # The table of gene symbols.
    package_data={"": ["*.csv.gz"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        # Exact: we replace parts of it, which other releases arrange in another way. Those that
        # were tried, and its faults that we work around: docs/parallel.md.
        "megatron-core==0.16.1",
        "numpy",
        "safetensors>=0.8",
        "omegaconf",
        "pyyaml",
        # megatron-core's checkpoints hang without it, and it does not say so.
        "psutil",
        "tensorboard",
        "anndata",
        "h5py",
        "zarr>=3",
        "scipy",
        "pandas",
        "pyarrow",
        "numba",
        "tiledbsoma",
        "matplotlib",
    ],
    # torchrun finds its backends so.
    entry_points={"torchrun.handlers": ["loopback = geneformer_mcore.distributed.network:handler"]},
    extras_require={
        # NVIDIA's apex is used where it is found, and is in no list: `apex` on PyPI is another
        # project (see geneformer_mcore/backends.py).
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "nvidia-dali-cuda130"],
        "eval": ["scanpy", "scikit-learn"],
        "census": ["cellxgene-census"],
        # What benchmarks/loader.py and benchmarks/train_step.py measure beside ours, as measured.
        "bench": [
            "tiledbsoma-ml==0.1.0",
            "scDataset==0.3.0",
            "bionemo-scdl==0.1.3",
            "datasets==5.2.0",
            "transformers==5.24.0",
        ],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist==3.8.0",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter==2.17",
            "pre-commit",
            # Its pipelines run on a CPU too, and are tested there.
            "nvidia-dali-cuda130",
            # The demo's cells lie in its wheel.
            "scanpy",
            # Conversions are compared with its models.
            "transformers==5.24.0",
            # The notebooks of docs/notebooks are executed by tests.
            "nbclient",
            "ipykernel",
        ],
    },
)
