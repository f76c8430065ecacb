"""Pretraining of Geneformer, a BERT over ranked genes of single cells, on Megatron-Core."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`geneformer_mcore.embed`, imported only when it is asked for."""
    if name == "embed":
        from geneformer_mcore.downstream.notebook import embed

        return embed
    raise AttributeError(f"module 'geneformer_mcore' has no attribute {name!r}")
