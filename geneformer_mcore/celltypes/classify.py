"""The model card's benchmark on any labelled cells: what launch/classify.py does.

labelled cells  ->  were they trained on?  ->  embeddings of each model, log counts  ->  Features
Features x classifiers x folds  ->  predicted labels  ->  scores  ->  Classification

Every method sees the same cells in the same folds: a cell that one of them cannot use (no label, a
rare one, no known gene) is left out for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
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
from geneformer_mcore.inference.embed import Choices, is_embedded
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.progress import Progress, ProgressLine
from geneformer_mcore.tokenizer.genes import InputOptions

PCA = f"PCA({NUM_COMPONENTS}) of log counts"
UNTRAINED = "untrained"
NO_DONOR = "none"


@dataclass(frozen=True)
class ClassifyRequest:
    """What launch/classify.py was asked for.

    checkpoints:     {name: run or step folder};  obsm: embeddings that the file holds already
    label, donor:    columns of obs; "" looks for one; donor "none" takes none
    untrained:       also the first checkpoint's model with random weights
    training_store:  a token store that models were trained on, where it has moved
    resamples:       draws of the bootstrap
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
    """One line of the table. predicted_N: object, of the scheme's cells; scores: see Scores.of."""

    features: str
    classifier: str
    predicted_N: np.ndarray
    scores: dict[str, Any]


@dataclass(frozen=True)
class Best:
    """The best classifier on PCA, the best method of all others, and what that one gains over it.

    gain: macro F1, {"value", "low", "high"}. That each is the best of several on these very cells
    the interval does not know.
    """

    pca: Method
    other: Method
    gain: dict[str, float]


@dataclass(frozen=True)
class Judged:
    """One scheme, and all methods in it; labels: sorted, as the scores have them."""

    scheme: Scheme
    labels: list[str]
    methods: list[Method]
    best: Best

    def method(self, features: str, classifier: str = FOREST) -> Method:
        """The one of these names."""
        wanted = (features, classifier)
        return next(each for each in self.methods if (each.features, each.classifier) == wanted)


@dataclass(frozen=True)
class Classification:
    """All that was found.

    facts:     plain JSON: cells, models, overlap, settings
    notes:     sentences that a reader must know
    features:  as they were given to the classifiers, PCA first
    """

    cells: Labelled
    features: list[Features]
    judged: list[Judged]
    facts: dict[str, Any]
    notes: list[str]


def classify(request: ClassifyRequest) -> Classification:
    """Does it, in this process. Raises a GeneformerError for all that the user can mend."""
    _check(request)
    models = _models(request)
    donor = "" if request.donor == NO_DONOR else request.donor
    cells = labelled.read(request.source, request.label, donor, request.options)
    if request.donor == NO_DONOR:
        cells = replace(cells, donor="", donors_N=None)
    # Labels that will not do are told at once, not after an hour of embedding.
    cross_validation.stratified(cells.labels_N, cells.labels_N != "", request.seed)
    given = {name: anndata_out.read_obsm(Path(request.source), name) for name in request.obsm}
    with ProgressLine("cells") as line:
        found, notes = data_leakage.check(
            request.source,
            models,
            lambda model: _open(request, model),
            request.training_store,
            request.allow_overlap,
            line.update,
        )
    notes += [
        f"whether the model of obsm {name} was trained on these cells was not checked: an "
        "embedding does not say it."
        for name in given
    ]
    embedded = {name: _embed(request, model) for name, model in models.items()} | given
    usable_N, reasons = _usable(cells, embedded)
    features = _features(cells, embedded, usable_N)
    cells = cells.without_counts()
    schemes = _schemes(cells, usable_N, request.seed, notes)
    with ProgressLine("folds") as line:
        judged = [_judge(scheme, features, cells, request, line.update) for scheme in schemes]
    facts = _facts(request, cells, models, found, reasons)
    return Classification(cells, features, judged, facts, notes)


def _check(request: ClassifyRequest) -> None:
    if not request.checkpoints and not request.obsm:
        raise ConfigError("nothing to judge: give --checkpoint RUN, or --obsm NAME.")
    if request.untrained and not request.checkpoints:
        raise ConfigError("--untrained needs a --checkpoint, whose shape it takes.")
    names = [PCA, UNTRAINED, *request.obsm]
    twice = [name for name in request.checkpoints if name in names]
    if twice:
        raise ConfigError(f"--checkpoint {twice[0]}=...: this name is taken. Remedy: another one.")
    if request.obsm and not Path(request.source).is_file():
        raise ConfigError(
            f"--obsm {request.obsm[0]}: embeddings are read from h5ad files only, and "
            f"{request.source} is no file. Remedy: write the cells as h5ad."
        )
    if request.resamples < 0:
        raise ConfigError(f"--resamples must be 0 (no intervals) or more: {request.resamples}.")


def _models(request: ClassifyRequest) -> dict[str, Pretrained]:
    found = {
        name: pretrained.find(path, request.vocabulary)
        for name, path in request.checkpoints.items()
    }
    if request.untrained:
        first = next(iter(found.values()))
        return {UNTRAINED: replace(first, initial_seed=request.seed)} | found
    return found


def _open(request: ClassifyRequest, model: Pretrained) -> CountedCells:
    seq_length = model.config.data.seq_length
    return CountedCells(request.source, model.vocabulary, seq_length, request.options)


def _embed(request: ClassifyRequest, model: Pretrained) -> np.ndarray:
    """float32 [cells, H], NaN for cells without a known gene."""
    with ExitStack() as stack:
        cells = _open(request, model)
        stack.callback(cells.close)
        values_NH, _ = embed.embed_cells(model, cells, request.choices, shows_progress=True)
    assert values_NH is not None, "one process holds them all"
    return values_NH


def _usable(
    cells: Labelled, embedded: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, int]]:
    """(bool [cells], {why not: cells})."""
    has_label_N = cells.labels_N != ""
    has_vector_N = np.ones(len(has_label_N), bool)
    for values_NH in embedded.values():
        has_vector_N &= is_embedded(values_NH)
    is_empty_N = np.asarray(cells.counts_NG.sum(axis=1)).ravel() == 0
    usable_N = has_label_N & has_vector_N & ~is_empty_N
    return usable_N, {
        "no_label": int((~has_label_N).sum()),
        "no_known_gene": int((has_label_N & ~(has_vector_N & ~is_empty_N)).sum()),
    }


def _features(
    cells: Labelled, embedded: Mapping[str, np.ndarray], usable_N: np.ndarray
) -> list[Features]:
    """Rows that are not usable are left empty, so that rows are those of the file throughout."""
    logs = labelled.log_counts(cells.counts_NG, usable_N)
    found = [Features(PCA, logs, is_counts=True)]
    return found + [Features(name, values) for name, values in embedded.items()]


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
    place = np.full(len(cells.labels_N), -1)
    place[scheme.cells] = np.arange(len(scheme.cells))
    folds = {name: place[test] for name, (_, test) in scheme.folds.items()}
    methods: list[Method] = []
    for each in features:
        found = cross_validation.predict(each, cells.labels_N, scheme, request.seed, progress)
        for classifier, predicted_N in found.items():
            baseline_N = methods[0].predicted_N if methods else predicted_N
            scored = scores.of(predicted_N, folds, baseline_N)
            methods.append(Method(each.name, classifier, predicted_N, scored))
    return Judged(scheme, scores.labels, methods, _best(methods, scores))


def _best(methods: Sequence[Method], scores: Scores) -> Best:
    ordered = sorted(methods, key=lambda each: -each.scores["macro_f1"]["value"])
    of_pca = next(each for each in ordered if each.features == PCA)
    other = next(each for each in ordered if each.features != PCA)
    return Best(of_pca, other, scores.gain(other.predicted_N, of_pca.predicted_N))


def _facts(
    request: ClassifyRequest,
    cells: Labelled,
    models: Mapping[str, Pretrained],
    overlaps: Mapping[str, Any],
    reasons: Mapping[str, int],
) -> dict[str, Any]:
    choices = {key: value for key, value in asdict(request.choices).items() if value}
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
        "embedding": choices,
        "seed": request.seed,
        "resamples": request.resamples,
    }
