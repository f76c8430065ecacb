"""What every forked rank needs, imported once in the process they are forked from."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geneformer_mcore.checkpoint.saving
    import geneformer_mcore.checkpoint.state
    import geneformer_mcore.feed.loader
    import geneformer_mcore.train.step  # noqa: F401
