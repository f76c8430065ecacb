"""Pretraining of Geneformer, a BERT over ranked genes of single cells, on Megatron-Core."""

from geneformer_mcore.version import __version__ as __version__


def __getattr__(name: str) -> object:
    """`geneformer_mcore.embed` and `.perturb`, imported only when they are asked for."""
    if name in ("embed", "perturb"):
        from geneformer_mcore import api

        return getattr(api, name)
    raise AttributeError(f"module 'geneformer_mcore' has no attribute {name!r}")
