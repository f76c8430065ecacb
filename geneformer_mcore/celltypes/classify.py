"""The model card's benchmark of cell type classification, on any labelled cells.

labelled cells  ->  data leakage?  ->  embeddings of each model, log counts  ->  Features
Features x classifiers x folds  ->  predicted labels  ->  scores  ->  Classification

Every method gets the same cells in the same folds: cells that one of them cannot use (no label, a
rare one, no known gene) are left out for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.celltypes import cross_validation, labelled
from geneformer_mcore.celltypes.cross_validation import (
    FOREST,
    NUM_COMPONENTS,
    Features,
    Scheme,
    Scores,
)
from geneformer_mcore.celltypes.labelled import Labelled
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.inference import data_leakage, embed, pretrained
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.embed import Choices, has_values
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.progress import Progress, ProgressLine
from geneformer_mcore.tokenizer.genes import InputOptions

PCA = f"PCA({NUM_COMPONENTS}) of log counts"
UNTRAINED = "untrained"
NO_DONOR = "none"


@dataclass(frozen=True)
class ClassifyRequest:
    """Arguments of launch/classify.py.

    checkpoints:     {name: run or step folder};  obsm: embeddings in the file
    label, donor:    columns of obs; "" takes a default; donor "none" takes none
    untrained:       also the first checkpoint's model with random weights
    training_store:  a token store of the training, where it has moved
    resamples:       of the bootstrap
    """

    source: str
    checkpoints: Mapping[str, Path]
    obsm: Sequence[str] = ()
    label: str = ""
    donor: str = ""
    untrained: bool = False
    choices: Choices = field(default_factory=Choices)
    options: InputOptions = field(default_factory=InputOptions)
    vocabulary: Path | None = None
    training_store: Path | None = None
    allow_overlap: bool = False
    seed: int = 0
    resamples: int = 1000


@dataclass(frozen=True)
class Method:
    """A row of the table. predicted_N: object, of the scheme's cells; scores: see Scores.of."""

    features: str
    classifier: str
    predicted_N: np.ndarray
    scores: dict[str, Any]


@dataclass(frozen=True)
class Best:
    """The best method on PCA and the best of all others. gain: their difference in macro F1,
    {"value", "low", "high"}, not corrected for the choice of the best."""

    pca: Method
    other: Method
    gain: dict[str, float]


@dataclass(frozen=True)
class Judged:
    """All methods in one scheme. labels: sorted, as in the scores."""

    scheme: Scheme
    labels: list[str]
    methods: list[Method]
    best: Best

    def method(self, features: str, classifier: str = FOREST) -> Method:
        """The method by its names."""
        names = (features, classifier)
        return next(each for each in self.methods if (each.features, each.classifier) == names)


@dataclass(frozen=True)
class Classification:
    """Result of a ClassifyRequest.

    features:  input of the classifiers, PCA first
    facts:     plain JSON: cells, models, overlap, settings
    notes:     caveats, as sentences
    """

    cells: Labelled
    features: list[Features]
    judged: list[Judged]
    facts: dict[str, Any]
    notes: list[str]


def classify(request: ClassifyRequest) -> Classification:
    """Classify in this process. Raises a GeneformerError for the user's mistakes."""
    _check(request)
    models = _models(request)
    donor = "" if request.donor == NO_DONOR else request.donor
    cells = labelled.read(request.source, request.label, donor, request.options)
    if request.donor == NO_DONOR:
        cells = replace(cells, donor="", donors_N=None)
    # Unsuitable labels are refused before an hour of embedding.
    cross_validation.stratified(cells.labels_N, cells.labels_N != "", request.seed)
    given = {name: anndata_out.read_obsm(Path(request.source), name) for name in request.obsm}
    with ProgressLine("cells") as line:
        store, allow, opened = (
            request.training_store,
            request.allow_overlap,
            partial(_open, request),
        )
        found, notes = data_leakage.check(request.source, models, opened, store, allow, line.update)
    notes += [
        f"whether the model of obsm {name} was trained on these cells was not checked: an "
        "embedding does not say it."
        for name in given
    ]
    embedded = {name: _embed(request, model) for name, model in models.items()} | given
    usable_N, reasons = _usable(cells, embedded)
    # Rows that are not usable stay, empty: rows are those of the file throughout.
    logs = labelled.log_counts(cells.counts_NG, usable_N)
    features = [Features(PCA, logs, is_counts=True)]
    features += [Features(name, values) for name, values in embedded.items()]
    cells = cells.without_counts()
    schemes = _schemes(cells, usable_N, request.seed, notes)
    with ProgressLine("folds") as line:
        judged = [_judge(scheme, features, cells, request, line.update) for scheme in schemes]
    facts = _facts(request, cells, models, found, reasons)
    return Classification(cells, features, judged, facts, notes)


def _check(request: ClassifyRequest) -> None:
    if not request.checkpoints and not request.obsm:
        raise ConfigError("nothing to judge: give `checkpoints=RUN`, or `obsm=NAME`.")
    if request.untrained and not request.checkpoints:
        raise ConfigError("`untrained=True` needs one of `checkpoints=`, whose shape it takes.")
    names = [PCA, UNTRAINED, *request.obsm]
    twice = [name for name in request.checkpoints if name in names]
    if twice:
        raise ConfigError(f"`checkpoints={twice[0]}=...`: the name is taken. Remedy: another one.")
    if request.obsm and not Path(request.source).is_file():
        raise ConfigError(
            f"`obsm={request.obsm[0]}`: embeddings are read from h5ad files only, and "
            f"{request.source} is no file. Remedy: write the cells as h5ad."
        )
    if request.resamples < 0:
        raise ConfigError(f"`resamples=` must be 0 (no intervals) or more: {request.resamples}.")


def _models(request: ClassifyRequest) -> dict[str, Pretrained]:
    paths = request.checkpoints.items()
    found = {name: pretrained.find(path, request.vocabulary) for name, path in paths}
    if request.untrained:
        first = next(iter(found.values()))
        return {UNTRAINED: replace(first, initial_seed=request.seed)} | found
    return found


def _open(request: ClassifyRequest, model: Pretrained) -> CountedCells:
    seq_length = model.config.data.seq_length
    return CountedCells(request.source, model.vocabulary, seq_length, request.options)


def _embed(request: ClassifyRequest, model: Pretrained) -> np.ndarray:
    """float32 [cells, H], NaN for cells without a known gene."""
    with closing(_open(request, model)) as cells:
        values_NH, _ = embed.embed_cells(model, cells, request.choices, shows_progress=True)
    assert values_NH is not None, "one process holds them all"
    return values_NH


def _usable(
    cells: Labelled, embedded: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, int]]:
    """(bool [cells], {why not: cells})."""
    has_label_N = cells.labels_N != ""
    has_gene_N = np.asarray(cells.counts_NG.sum(axis=1)).ravel() > 0
    for values_NH in embedded.values():
        has_gene_N &= has_values(values_NH)
    return has_label_N & has_gene_N, {
        "no_label": int((~has_label_N).sum()),
        "no_known_gene": int((has_label_N & ~has_gene_N).sum()),
    }


def _schemes(cells: Labelled, usable_N: np.ndarray, seed: int, notes: list[str]) -> list[Scheme]:
    first = cross_validation.stratified(cells.labels_N, usable_N, seed)
    if cells.donors_N is None:
        notes.append("no two donors are named: nothing says how figures hold for another donor.")
        return [first]
    second = cross_validation.by_donor(cells.labels_N, cells.donors_N, first.cells)
    if isinstance(second, Scheme):
        return [first, second]
    notes.append(f"leave one donor out was left out: {second}.")
    return [first]


def _judge(
    scheme: Scheme,
    features: Sequence[Features],
    cells: Labelled,
    request: ClassifyRequest,
    progress: Progress,
) -> Judged:
    truth_N = cells.labels_N[scheme.cells]
    donors_N = None
    if scheme.name == cross_validation.BY_DONOR:
        assert cells.donors_N is not None
        donors_N = cells.donors_N[scheme.cells]
    scores = Scores(truth_N, request.resamples, request.seed, donors_N)
    # scheme.cells ascends.
    folds = {name: np.searchsorted(scheme.cells, test) for name, (_, test) in scheme.folds.items()}
    methods: list[Method] = []
    for each in features:
        found = cross_validation.predict(each, cells.labels_N, scheme, request.seed, progress)
        for classifier, predicted_N in found.items():
            baseline_N = methods[0].predicted_N if methods else predicted_N
            scored = scores.of(predicted_N, folds, baseline_N)
            methods.append(Method(each.name, classifier, predicted_N, scored))
    ordered = sorted(methods, key=lambda each: -each.scores["macro_f1"]["value"])
    of_pca = next(each for each in ordered if each.features == PCA)
    other = next(each for each in ordered if each.features != PCA)
    best = Best(of_pca, other, scores.gain(other.predicted_N, of_pca.predicted_N))
    return Judged(scheme, scores.labels, methods, best)


def _facts(
    request: ClassifyRequest,
    cells: Labelled,
    models: Mapping[str, Pretrained],
    overlaps: Mapping[str, Any],
    reasons: Mapping[str, int],
) -> dict[str, Any]:
    return {
        "input": Path(request.source).name,
        "label": cells.label,
        "donor": cells.donor,
        "num_cells": len(cells.names),
        "left_out": dict(reasons),
        "num_genes": cells.counts_NG.shape[1],
        "models": {
            name: embed.facts_of(model) | {"random_weights": model.initial_seed is not None}
            for name, model in models.items()
        },
        "overlap": dict(overlaps),
        "embedding": {key: value for key, value in asdict(request.choices).items() if value},
        "seed": request.seed,
        "resamples": request.resamples,
    }
