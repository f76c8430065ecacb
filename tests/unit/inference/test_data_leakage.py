"""Data leakage: training cells are found again by their content, whatever they are called and
whichever genes are left; and what is reported of a model by it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config import parse
from geneformer_mcore.data.counts_source import CountsSource
from geneformer_mcore.errors import DataError
from geneformer_mcore.inference import data_leakage
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.data_leakage import Overlap, TrainingCells
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import no_progress
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS, RaggedCells
from tests.support.small_cells import gene_ids, random_counts, vocabulary_of, write_h5ad
from tests.support.small_store import write_small_store

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 60, 900, 200
VOCABULARY = vocabulary_of(NUM_GENES)


def opened(path: Path, vocabulary: Vocabulary = VOCABULARY) -> CountedCells:
    return CountedCells(str(path), vocabulary, SEQ_LENGTH, InputOptions())


def compared(
    judged: Path, *files: Path, vocabulary: Vocabulary = VOCABULARY, by_file: bool = False
) -> Overlap:
    """The result of overlap.find for training files, all at once or each by its own genes."""
    source = CountsSource(list(map(str, files)), vocabulary, SEQ_LENGTH, RandomSplit(0.0))
    with closing(source), closing(opened(judged, vocabulary)) as cells:
        has_gene_V = np.zeros(vocabulary.size, bool)
        has_gene_V[cells.genes.token_of_column] = True
        datasets = [source.datasets] if by_file else []
        training = TrainingCells("", source, 0, len(source), SEQ_LENGTH, *datasets)
        return data_leakage.find(cells, has_gene_V, training)


@pytest.fixture
def counts(rng):
    return random_counts(rng, 2 * NUM_CELLS, NUM_GENES)


@pytest.fixture
def write(tmp_path):
    return lambda name, *values, **parts: write_h5ad(tmp_path / f"{name}.h5ad", *values, **parts)


def test_the_same_cells_under_other_names_with_fewer_genes_are_found(write, counts, rng) -> None:
    genes, rows = rng.permutation(NUM_GENES)[:600], rng.permutation(NUM_CELLS)
    names = [f"other{row}" for row in rows]
    judged = write("b", counts[rows][:, genes], gene_ids(genes.tolist()), cell_ids=names)
    found = compared(judged, write("a", counts[:40]))
    np.testing.assert_array_equal(found.same_N, rows < 40)
    assert found.share_N[rows < 40].min() > 0.8
    assert found.share_N[rows >= 40].max() < 0.05
    assert found.num_training == 40
    assert not found.too_short_N.any()


def test_each_training_file_is_compared_by_its_own_genes(write, counts, rng) -> None:
    """A copy with half the genes, alone and next to strangers with all of them."""
    half = rng.permutation(NUM_GENES)[: NUM_GENES // 2]
    names = [f"other{number}" for number in range(40)]
    fewer = write("fewer", counts[:40, half], gene_ids(half.tolist()), cell_ids=names)
    judged, strangers = write("judged", counts[:NUM_CELLS]), write("others", counts[NUM_CELLS:])
    for found in (compared(judged, fewer), compared(judged, fewer, strangers, by_file=True)):
        np.testing.assert_array_equal(found.same_N, np.arange(NUM_CELLS) < 40)
    assert found.num_training == 40 + NUM_CELLS


def test_blocks_make_no_difference(write, counts, monkeypatch) -> None:
    judged, training = write("b", counts[:NUM_CELLS]), write("a", counts[20:50])
    whole = compared(judged, training)
    monkeypatch.setattr(data_leakage, "BLOCK_CELLS", 7)
    np.testing.assert_array_equal(whole.share_N, compared(judged, training).share_N)
    assert whole.same_N.sum() == 30


def test_cells_of_few_genes_cannot_be_distinguished_and_are_counted(write, counts) -> None:
    few = np.zeros((3, NUM_GENES), np.float32)
    few[0, :18], few[1, :19], few[2, :1] = 1, 1, 5
    file = write("a", np.concatenate([counts[:NUM_CELLS].toarray(), few]))
    found = compared(file, file)
    assert found.too_short_N[NUM_CELLS:].tolist() == [True, False, True]
    assert found.same_N[NUM_CELLS:].tolist() == [False, True, False]
    assert found.same_N[:NUM_CELLS].all()
    assert found.num_training_too_short == 2
    assert found.num_training == NUM_CELLS + 1


def test_windows_are_distinguished_exactly() -> None:
    tokens = np.array([5, 6, 7, 8, 9, 65_535, 8, 7, 6, 5, 4], np.uint16)
    cells = RaggedCells(tokens, np.array([0, 5, 11]), np.zeros(2, np.uint64))
    both_V = np.ones(65_536, bool)
    both_V[:NUM_SPECIALS] = False
    owners, windows = data_leakage._windows(cells, both_V[None], np.zeros(2, int))
    assert owners.tolist() == [0, 0, 1, 1]
    assert len(set(windows.tolist())) == 4
    assert windows[0] == 5 | 6 << 16 | 7 << 32 | 8 << 48


def test_nothing_in_common_is_no_overlap(write, counts) -> None:
    files = (
        write(f"{start}", counts[:8, :200], gene_ids(range(start, start + 200)))
        for start in (0, 200)
    )
    found = compared(*files)
    assert not found.same_N.any()
    assert found.too_short_N.all()


@pytest.fixture(scope="module")
def real(shared_data):
    """The result of overlap.find for real files, by Geneformer's own genes and medians."""
    vocabulary = import_dictionary(shared_data / "dicts" / "gc30m_gene_medians.json")
    return lambda *files: compared(
        *(shared_data / f"{file}.h5ad" for file in files), vocabulary=vocabulary
    )


def test_pbmc3k_of_two_sources(shared_data, real, rng, tmp_path) -> None:
    """13,714 filtered genes by symbol against 32,738, other names and ids."""
    cells = anndata.read_h5ad(shared_data / "pbmc3k_labelled.h5ad")
    genes = np.sort(rng.permutation(cells.n_vars)[: cells.n_vars // 2])
    cells[:, genes].copy().write_h5ad(tmp_path / "half.h5ad")
    for judged in ("pbmc3k_labelled", tmp_path / "half"):
        found = real(judged, "pbmc3k_raw")
        assert found.same_N.all()
        assert found.share_N.min() > 0.9
    back = real("pbmc3k_raw", "pbmc3k_labelled")
    assert int(back.same_N.sum()) == len(found.same_N), "62 more are in the raw file alone"
    assert back.share_N[~back.same_N].max() < 0.05


@pytest.mark.parametrize("other", ["marrow_cd34_palantir", "heart_san_1k", "lca_lung_1k", None])
def test_other_real_cells_are_others(real, shared_data, tmp_path, other: str | None) -> None:
    """Of other studies; and, None, of the same."""
    judged, trained_on = "pbmc3k_labelled", other
    if other is None:
        cells = anndata.read_h5ad(shared_data / "heart_san_1k.h5ad")
        judged, trained_on = tmp_path / "a", tmp_path / "b"
        for path, part in ((judged, cells[:500]), (trained_on, cells[500:])):
            part.copy().write_h5ad(path.with_suffix(".h5ad"))
    found = real(judged, trained_on)
    assert not found.same_N.any()
    assert found.share_N.max() < 0.05


# Reports for models


@pytest.fixture
def places(rng, write, tmp_path) -> dict[str, tuple[Path, Path, str]]:
    """Files of cells, and stores of them: {name: (h5ad, store, content hash)}."""
    found = {}
    for name in ("mine", "others"):
        h5ad = write(name, random_counts(rng, NUM_CELLS, NUM_GENES))
        with closing(opened(h5ad)) as cells:
            read = cells.read(0, len(cells))
        tokens = [part.tolist() for part in np.split(read.tokens_T, read.offsets[1:-1])]
        store = tmp_path / f"store_{name}"
        manifest = write_small_store(store, tokens, NUM_GENES, SEQ_LENGTH)
        found[name] = h5ad, store, manifest.content_hash
    return found


def model(store: Path, content: str, **task: Any) -> Pretrained:
    """One that was trained on the cells of this content, from that store."""
    config = parse("{}", "", [f"data.store={store}", f"data.seq_length={SEQ_LENGTH}"])
    identity = Identity("", {}, VOCABULARY.checksum, content, task)
    record = Record(2, 32, {}, identity, {}, {}, {})
    return Pretrained(store.parent / "checkpoints" / "step", record, config, VOCABULARY, "")


def check(h5ad: Path, store: Path | None = None, allow: bool = False, **models: Pretrained):
    """(facts of each model, notes)."""
    return data_leakage.check(h5ad.name, models, lambda _: opened(h5ad), store, allow, no_progress)


def test_of_a_fine_tuned_model_only_its_tuning_is_known(places) -> None:
    (mine, _, _), (_, store, content) = places["mine"], places["others"]
    found, (note,) = check(mine, m=model(store, content, pretrained="lung abc", classes=["a"]))
    assert found["m"]["pretraining_unknown"]
    for part in ("m was fine-tuned", "(lung abc) has seen these cells was not checked"):
        assert part in note
    expected = f"0 of {NUM_CELLS} cells fine-tuned on, its pretraining not checked"
    assert data_leakage.summary(found["m"]) == expected
    found, notes = check(mine, m=model(store, content))
    summary = data_leakage.summary(found["m"])
    assert (summary, notes) == (f"0 of {NUM_CELLS} cells trained on", [])


def test_a_training_store_is_taken_by_those_that_were_trained_on_it(places, tmp_path) -> None:
    mine, store, content = places["mine"]
    start, stop = Manifest.load(store).rows["train"]
    assert stop - start > NUM_CELLS / 2
    other = model(*places["others"][1:])
    models = {"moved": model(tmp_path / "gone", content), "other": other}
    message = f"{stop - start} of {NUM_CELLS} cells.*that moved was trained"
    with pytest.raises(DataError, match=message):
        check(mine, store, **models)
    found, notes = check(mine, store, allow=True, **models)
    assert (found["moved"]["cells"], found["other"]["cells"]) == (stop - start, 0)
    assert len(notes) == 1
    found, notes = check(mine, **models)
    assert found["moved"] is None
    assert "could not be checked" in notes[0]
    found, notes = check(mine, store, other=other)
    assert found["other"]["cells"] == 0
    assert "none of the models was trained on its cells" in notes[0]
    with pytest.raises(DataError, match="not a finished store"):
        check(mine, tmp_path / "nowhere", **models)


def test_cells_too_short_to_tell_are_not_called_unseen(places, write, counts) -> None:
    trained = model(*places["others"][1:])
    cells = counts[:6].toarray()
    cells[:2] = np.arange(NUM_GENES) < 5
    found, (note,) = check(write("a", cells), m=trained)
    assert note.startswith("2 of 6 cells have too few genes")
    expected = "0 of 4 cells trained on, 2 with too few genes to tell"
    assert data_leakage.summary(found["m"]) == expected
    summary = data_leakage.summary(check(write("b", cells[:2]), m=trained)[0]["m"])
    assert "0 of" not in summary
    assert "no cell has genes enough to tell" in summary
