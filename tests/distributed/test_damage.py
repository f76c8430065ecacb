"""A damaged checkpoint is found before any weight is used, and the one before it is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import saving
from geneformer_mcore.config.sections import CheckpointConfig
from tests.distributed import toy
from tests.distributed.ranks import run_ranks
from tests.distributed.test_saving import record

NUM_DAMAGES = 100


def save_twice(root: str) -> None:
    run = toy.make("model.num_layers=1", "parallel.tensor=2")
    saver = saving.Saver(
        Path(root), CheckpointConfig(), run.topology.rank, toy.CPU, lambda line: None
    )
    for step in (1, 2):
        saver.begin(run.trainable, record(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2 by two ranks."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(save_twice, 2, str(root))
    assert checkpoints.newest_good(root) == (checkpoints.step_folder(root, 2), [])
    return root


def flip_a_bit(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def cut(path: Path, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def lengthen(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(3))


def delete(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def test_no_damage_goes_unseen(saved: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    kinds: list[Callable[[Path, np.random.Generator], None]] = [flip_a_bit, cut, lengthen, delete]
    hit = set()
    for number in range(NUM_DAMAGES):
        root = tmp_path / str(number)
        shutil.copytree(saved, root)
        newest = checkpoints.step_folder(root, 2)
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        path = files[rng.integers(len(files))]
        kind = kinds[number % 8 % len(kinds)] if number % 2 else flip_a_bit
        kind(path, rng)
        hit.add(path.name)
        found, messages = checkpoints.newest_good(root)
        assert found == checkpoints.step_folder(root, 1), (kind.__name__, path)
        assert len(messages) == 1
        assert "It is now called damaged_step_0000000002" in messages[0]
        shutil.rmtree(root)
    assert {".metadata", "common.pt", "manifest.json", "record.json", "rank_00001.npz"} <= hit
