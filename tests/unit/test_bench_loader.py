"""benchmarks/loader.py: its measures, its goals, and that wrong cells do not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks.peers.all import CONTESTANTS
from benchmarks.peers.contestant import BATCH_SIZE, COUNTS, Contestant, shuffled_batches
from benchmarks.peers.masking import IGNORED, masked, sums_of_masked
from benchmarks.peers.padding import padded, sums_of_padded
from benchmarks.side_by_side import turn
from benchmarks.side_by_side.goals import Goal, best, ratio
from benchmarks.side_by_side.loader_rows import goals_of, row, table
from benchmarks.side_by_side.prepared import Truth
from benchmarks.side_by_side.shuffle_quality import quality, two_epochs
from benchmarks.side_by_side.versions import version_of
from geneformer_mcore.contracts import MASK, PAD
from geneformer_mcore.errors import DataError

NUM_CELLS = 64 * 64


def shuffled(epoch: int) -> np.ndarray:
    return np.concatenate(shuffled_batches(NUM_CELLS, epoch))


def test_a_uniform_shuffle_measures_one(rng: np.random.Generator) -> None:
    found = quality(shuffled(5), np.repeat(np.arange(4), NUM_CELLS // 4), 64)
    assert found == {name: pytest.approx(1, abs=0.05) for name in found}


def test_source_order_is_not_mixed() -> None:
    found = quality(np.arange(NUM_CELLS), np.repeat(np.arange(4), NUM_CELLS // 4), 64)
    assert found["blocks"] == pytest.approx(1 / 40, abs=0.01)  # one block, where 40 are usual
    assert found["datasets"] == 0
    assert found["distance"] == pytest.approx(1 / (0.293 * NUM_CELLS), rel=0.1)


def test_epochs_are_compared() -> None:
    one, other = shuffled(0), shuffled(1)
    found = two_epochs(one, other, NUM_CELLS, 64)
    assert found == {
        "each_once": True,
        "epochs_differ": True,
        "mates_again": pytest.approx(1, abs=0.1),
    }
    same = two_epochs(one, one, NUM_CELLS, 64)
    assert same["epochs_differ"] is False
    assert same["mates_again"] == pytest.approx((NUM_CELLS - 1) / 63)
    twice = np.concatenate([one[:-1], one[:1]])
    assert two_epochs(one, twice, NUM_CELLS, 64)["each_once"] is False
    assert two_epochs(one[:-1], one, NUM_CELLS, 64)["each_once"] is False


def test_batches_are_padded_by_the_rule_of_the_feed() -> None:
    cells = [np.arange(70, dtype=np.uint16), np.array([0, 9], np.uint16)]
    tokens = padded(cells).numpy()
    assert tokens.shape == (2, 128)
    assert tokens.dtype == np.int32
    assert tokens[0, :70].tolist() == list(range(70))
    assert np.all(tokens[0, 70:] == PAD)
    assert tokens[1, :3].tolist() == [0, 9, PAD]
    with_cls = padded([cell[1:] for cell in cells], with_cls=False)
    assert np.array_equal(with_cls, tokens)
    assert padded([np.ones(2048, np.uint16)]).shape == (1, 2048)
    assert sums_of_padded(padded(cells)).tolist() == [sum(range(70)) - PAD, 9]


def test_peers_masks_are_of_the_asked_shares() -> None:
    torch.manual_seed(0)
    tokens = padded([np.arange(5, 2052, dtype=np.uint16)] * 64, with_cls=False)
    tokens[:, 1500:] = PAD
    seen, labels = masked(tokens)
    asked = labels != IGNORED
    assert torch.equal(labels[asked], tokens[asked])
    assert torch.equal(seen[~asked], tokens[~asked])
    assert not asked[:, 0].any(), "[CLS] is never asked for"
    assert not asked[:, 1500:].any()
    assert asked[:, 1:1500].double().mean() == pytest.approx(0.15, abs=0.01)
    assert (seen[asked] == MASK).double().mean() == pytest.approx(0.8, abs=0.01)
    assert (seen[asked] == tokens[asked]).double().mean() == pytest.approx(0.18, abs=0.01)
    assert np.array_equal(sums_of_masked((seen, labels)), sums_of_padded(tokens))


def test_a_goal_says_whether_it_is_met() -> None:
    assert "15 x (bar >= 15 x): met" in str(Goal("a", 15.0, 15))
    assert "MISSED" in str(Goal("a", 14.9, 15))
    assert "MISSED" in str(Goal("a", 1000.0, 1000, "MiB", at_most=True))
    assert "not measured" in str(Goal("a", None, 15))
    assert (ratio(6.0, 3.0), ratio(None, 3.0), ratio(3.0, None)) == (2, None, None)
    assert (best([None, 2.0, 1.0]), best([None])) == (2, None)


def one_row(name: str, cells_per_s: float) -> dict[str, Any]:
    shuffle = {"blocks": 1.0, "datasets": 1.0, "distance": 1.0, "mates_again": 1.0}
    found = {
        "cells_per_s": cells_per_s,
        "tokens_per_s": 1e6,
        "cpu_us_per_cell": 9.0,
        "first_batch_s": 0.5,
        "peak_mib": 900.0,
        "before_mib": 1.0,
        "cold_start_s": 1.0,
        "epochs": 1,
        "shuffle": shuffle | {"each_once": True, "epochs_differ": False},
    }
    turns = [found | {"cells_per_s": cells_per_s * factor} for factor in (0.1, 1, 7)]
    return row(name, turns, None)


def test_rows_are_medians_and_goals_their_ratios() -> None:
    rates = {
        "counts_soma_dense": 2.0,
        "counts_soma_sparse": 4.0,
        "counts_scdl": 40.0,
        "tokens_soma": 10.0,
        "tokens_scdataset": 20.0,
        "tokens_arrow": 50.0,
        "tokens_scdataset_array": 80.0,
        "masked_scdl": 25.0,
        "soma_tokenised": 3.0,
        "ours_store": 100.0,
        "ours_flat": 300.0,
        "ours_h5ad": 6.0,
    }
    goals = {goal.what: goal for goal in goals_of([one_row(*item) for item in rates.items()])}
    values = [goal.value for goal in goals.values()]
    assert values[:8] == [50, 25, 5, 2.5, 3.75, 12, 4, 2]
    assert goals[
        "ours on the fly, counts in h5ad / tiledbsoma-ml with HF-style tokenising"
    ].met is (False)
    assert [goal.met for goal in goals.values()][8] is None, "nothing from a SOMA experiment"
    assert goals["ours, flat copy of it: resident memory"].value == 900


def test_who_was_not_measured_is_in_the_table() -> None:
    failed = row("tokens_scdl", [], "bionemo-scdl is not installed")
    text = table([one_row("ours_store", 5.0), failed])
    assert "not measured: bionemo-scdl, rows of token ids: bionemo-scdl is not installed" in text
    line = next(line for line in text.splitlines() if line.startswith("ours"))
    assert line.split()[-2:] == ["yes", "NO"]
    assert version_of("no-such-distribution") == "not installed"


class Fake(Contestant):
    """Rows of a uniform shuffle, with the sums that it is told."""

    label = "fake"
    table = COUNTS
    package = "fake"
    sums_of_row: ClassVar[np.ndarray] = np.arange(NUM_CELLS, dtype=float)

    def __init__(self, data: Any) -> None:
        self.num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        return iter(shuffled_batches(self.num_cells, number))

    def cells(self, batch: Any) -> np.ndarray:
        return batch

    def sums(self, batch: Any) -> np.ndarray:
        return self.sums_of_row[batch]


class FakeData:
    """As many cells as there are sums; the sum of a cell's counts is its row."""

    def __init__(self, num_cells: int) -> None:
        rows = np.arange(num_cells)
        self.truth = Truth(rows.astype(float), rows, rows + 1, rows // 2000, rows)

    def __len__(self) -> int:
        return len(self.truth.keys_N)


def test_a_turn_reads_whole_epochs_and_checks_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # An epoch takes milliseconds: on a busy machine, too, a second holds several.
    monkeypatch.setattr(turn, "MIN_S", 1.0)
    found = turn.take_turn(Fake, FakeData(NUM_CELLS), FakeData(128), with_check=True)  # type: ignore[arg-type]
    assert found["epochs"] > 1
    assert found["tokens_per_s"] / found["cells_per_s"] == pytest.approx((NUM_CELLS + 1) / 2)
    assert found["shuffle"]["each_once"]
    assert found["shuffle"]["epochs_differ"]
    assert found["peak_mib"] > 10
    assert 0 < found["cpu_us_per_cell"] < 1000


def test_a_wrong_cell_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "MIN_S", 0.0)
    wrong = Fake.sums_of_row.copy()
    wrong[77] += 1
    monkeypatch.setattr(Fake, "sums_of_row", wrong)
    data = FakeData(NUM_CELLS)
    with pytest.raises(DataError, match="1 cells hold something else"):
        turn.take_turn(Fake, data, FakeData(128), with_check=True)  # type: ignore[arg-type]


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "benchmarks" / "loader.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_it_measures_as_typed(repository: Path, tmp_path: Path) -> None:
    ours = ("ours_store", "ours_flat", "ours_h5ad")
    out = tmp_path / "out.json"
    small = ("--work", str(tmp_path / "work"), "--cells", "256", "--runs", "1", "--json", str(out))
    ended = start(repository, *small, "--only", *ours, "counts_backed", "counts_scdataset")
    assert ended.returncode == 0, ended.stderr
    kept = {found["name"]: found for found in json.loads(out.read_text())["rows"]}
    for name in (*ours, "counts_backed"):
        assert kept[name]["not_measured"] is None, kept[name]
        assert kept[name]["shuffle"]["each_once"] is True
        assert kept[name]["shuffle"]["epochs_differ"] is True
        assert kept[name]["cells_per_s"] > 0
    if version_of("scDataset") == "not installed":
        assert kept["counts_scdataset"]["not_measured"] == "scDataset is not installed"
    again = start(repository, *small[:2], "--cells", "512")
    assert again.returncode == 2
    assert "holds other cells (256 of made up)" in again.stderr


def test_what_cannot_be_measured_is_refused(repository: Path, tmp_path: Path) -> None:
    wrong = ("--runs", "0", "--cells", str(BATCH_SIZE - 1), "--only", "nobody")
    ended = start(repository, "--work", str(tmp_path), *wrong)
    assert ended.returncode == 2
    for message in ("--runs must be at least 1", "--cells must be at least 64", "no nobody"):
        assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_contestant_is_told_apart() -> None:
    labels = [kind.label for kind in CONTESTANTS.values()]
    assert len(set(labels)) == len(labels)
    assert {kind.table for kind in CONTESTANTS.values()} == {"counts", "tokens"}
