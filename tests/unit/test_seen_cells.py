"""What is said of cells that a model may have seen: tuned on, too short, in stores that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config import parse
from geneformer_mcore.errors import DataError
from geneformer_mcore.inference import data_leakage
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import no_progress
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.tokenizer.corpus import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.small_cells import random_counts, vocabulary_of, write_h5ad
from tests.small_store import write_small_store

NUM_GENES, NUM_CELLS, SEQ_LENGTH = 300, 40, 64
VOCABULARY = vocabulary_of(NUM_GENES)


def tokens_of(h5ad: Path) -> list[list[int]]:
    """The cells of a file as a store holds them."""
    cells = opened(h5ad)
    read = cells.read(0, len(cells))
    cells.close()
    return [part.tolist() for part in np.split(read.tokens_T, read.offsets[1:-1])]


def opened(h5ad: Path) -> CountedCells:
    return CountedCells(str(h5ad), VOCABULARY, SEQ_LENGTH, InputOptions())


def model(
    store: Path, content: str, folder: Path, vocabulary: Vocabulary, **task: Any
) -> Pretrained:
    """One that was trained on the cells of this content, from that store."""
    config = parse("{}", "", [f"data.store={store}", f"data.seq_length={SEQ_LENGTH}"])
    identity = Identity("", {}, vocabulary.checksum, content, task)
    record = Record(2, 32, {}, identity, {}, {}, {})
    return Pretrained(folder / "checkpoints" / "step", record, config, vocabulary, "")


@pytest.fixture
def places(rng: np.random.Generator, tmp_path: Path) -> dict[str, Any]:
    """Files of cells, and stores of them: {name: (h5ad, store, content hash)}."""
    found = {}
    for name in ("mine", "others"):
        h5ad = write_h5ad(tmp_path / f"{name}.h5ad", random_counts(rng, NUM_CELLS, NUM_GENES, 0.4))
        store = tmp_path / f"store_{name}"
        manifest = write_small_store(store, tokens_of(h5ad), NUM_GENES, SEQ_LENGTH)
        found[name] = h5ad, store, manifest.content_hash
    return found


def check(
    h5ad: Path, models: dict[str, Pretrained], store: Path | None = None, allow: bool = False
) -> tuple[dict[str, Any], list[str]]:
    return data_leakage.check(h5ad.name, models, lambda _: opened(h5ad), store, allow, no_progress)


def test_of_a_fine_tuned_model_only_its_tuning_is_known(
    places: dict[str, Any], tmp_path: Path
) -> None:
    (mine, _, _), (_, store, content) = places["mine"], places["others"]
    tuned = model(store, content, tmp_path, VOCABULARY, pretrained="lung abc", classes=["a"])
    found, (note,) = check(mine, {"tuned": tuned})
    assert found["tuned"]["pretraining_unknown"]
    assert "tuned was fine-tuned" in note
    assert "(lung abc) has seen these cells was not checked" in note
    told = f"0 of {NUM_CELLS} cells fine-tuned on, its pretraining not checked"
    assert data_leakage.summary(found["tuned"]) == told
    plain = model(store, content, tmp_path, VOCABULARY)
    found, notes = check(mine, {"plain": plain})
    assert not notes
    assert data_leakage.summary(found["plain"]) == f"0 of {NUM_CELLS} cells trained on"


def test_a_training_store_is_taken_by_those_that_were_trained_on_it(
    places: dict[str, Any], tmp_path: Path
) -> None:
    mine, store, content = places["mine"]
    others = places["others"]
    start, stop = Manifest.load(store).rows["train"]
    assert stop - start > NUM_CELLS / 2
    models = {
        "moved": model(tmp_path / "gone", content, tmp_path, VOCABULARY),
        "other": model(others[1], others[2], tmp_path, VOCABULARY),
    }
    with pytest.raises(
        DataError, match=f"{stop - start} of {NUM_CELLS} cells.*that moved was trained"
    ):
        check(mine, models, store)
    found, notes = check(mine, models, store, allow=True)
    assert found["moved"]["cells"] == stop - start
    assert found["other"]["cells"] == 0
    assert len(notes) == 1
    found, notes = check(mine, models)
    assert found["moved"] is None
    assert "could not be checked" in notes[0]
    found, notes = check(mine, {"other": models["other"]}, store)
    assert found["other"]["cells"] == 0
    assert "none of the models was trained on its cells" in notes[0]
    with pytest.raises(DataError, match="not a finished store"):
        check(mine, models, tmp_path / "nowhere")


def test_cells_too_short_to_tell_are_not_called_unseen(
    places: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    _, store, content = places["others"]
    trained = {"m": model(store, content, tmp_path, VOCABULARY)}
    counts = random_counts(rng, 6, NUM_GENES, 0.4).toarray()
    counts[:2] = 0
    counts[:2, :5] = 1
    found, (note,) = check(write_h5ad(tmp_path / "a.h5ad", counts), trained)
    assert note.startswith("2 of 6 cells have too few genes")
    told = "0 of 4 cells trained on, 2 with too few genes to tell"
    assert data_leakage.summary(found["m"]) == told
    found, _ = check(write_h5ad(tmp_path / "b.h5ad", counts[:2]), trained)
    assert "0 of" not in data_leakage.summary(found["m"])
    assert "no cell has genes enough to tell" in data_leakage.summary(found["m"])
