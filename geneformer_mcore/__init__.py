"""Pretraining of Geneformer, a BERT over ranked genes of single cells, on Megatron-Core."""

__version__ = "0.1.0"
