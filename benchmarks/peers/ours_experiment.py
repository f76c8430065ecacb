"""This project's on-the-fly source over the very experiment that tiledbsoma-ml reads."""

from __future__ import annotations

from benchmarks.peers.ours import FromH5ad
from benchmarks.peers.soma_ml import experiment
from benchmarks.side_by_side.prepared import Prepared
from geneformer_mcore.data.loader import Feed


class FromExperiment(FromH5ad):
    """On the fly, from the SOMA experiment of counts."""

    label = "ours on the fly, counts in SOMA"
    formats = (experiment,)

    def feed(self, data: Prepared) -> Feed:
        return self.on_the_fly(data, str(data.place("experiment")))
