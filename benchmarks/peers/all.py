"""Every contestant, in the order of the tables, ours first. Importing this needs no peer."""

from __future__ import annotations

from benchmarks.peers import (
    backed_anndata,
    hf_arrow,
    masking,
    ours,
    ours_experiment,
    sc_dataset,
    scdl,
)
from benchmarks.peers import soma_ml as soma
from benchmarks.peers.contestant import Contestant

CONTESTANTS: dict[str, type[Contestant]] = {
    "counts_soma_dense": soma.SomaDense,
    "counts_soma_sparse": soma.SomaSparse,
    "counts_backed": backed_anndata.BackedAnnData,
    "counts_scdataset": sc_dataset.BlocksOfCounts,
    "counts_scdataset_workers": sc_dataset.BlocksOfCountsTwoWorkers,
    "counts_scdl": scdl.ScdlCounts,
    "counts_scdl_workers": scdl.ScdlCountsTwoWorkers,
    "ours_store": ours.FromStore,
    "ours_flat": ours.FromFlatCopy,
    "ours_h5ad": ours.FromH5ad,
    "ours_experiment": ours_experiment.FromExperiment,
    "soma_tokenised": soma.SomaTokenised,
    "tokens_soma": soma.SomaTokens,
    "tokens_scdataset": sc_dataset.BlocksOfTokens,
    "tokens_scdataset_workers": sc_dataset.BlocksOfTokensTwoWorkers,
    "tokens_scdataset_arrow": sc_dataset.BlocksOfArrow,
    "tokens_scdataset_array": sc_dataset.BlocksOfArray,
    "tokens_scdataset_our_store": sc_dataset.BlocksOfOurStore,
    "tokens_scdl_items": scdl.ScdlTokenItems,
    "tokens_scdl": scdl.ScdlTokens,
    "tokens_arrow": hf_arrow.HFArrow,
    "tokens_arrow_workers": hf_arrow.HFArrowTwoWorkers,
    "masked_scdataset_array": masking.MaskedArray,
    "masked_scdl": masking.MaskedScdl,
    "masked_arrow": masking.MaskedArrow,
}
