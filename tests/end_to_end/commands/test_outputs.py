"""The files of a command appear together or not at all: after a full disk, a read-only folder and
SIGTERM half-way the same command succeeds, and nobody has cleaned up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.distributed.inference import conversions
from tests.end_to_end import forked
from tests.end_to_end.conftest import NUM_GENES
from tests.support import commands, plain_bert, small_disk
from tests.support.marks import soak

FEW = "--tokens-per-batch 4000"
PERTURBED = "--top 2 --null 2 --max-cells 8"


@dataclass(frozen=True)
class Case:
    """words: of the command; {DISK}, {RUN}, ... are folders and files. outputs: on the disk. again:
    what a second run of it ends with: "refused", or "replaced"."""

    words: str
    outputs: tuple[str, ...]
    again: str = "refused"


CASES = {
    "cells and genes": Case(
        "launch/embed.py --checkpoint {RUN} --input {H5AD} --output {DISK}/e.npy "
        f"--gene-embeddings {{DISK}}/g.csv {FEW}",
        ("e.npy", "e.json", "g.csv"),
    ),
    "annotated": Case(
        f"launch/embed.py --checkpoint {{RUN}} --input {{H5AD}} --output {{DISK}}/e.h5ad {FEW}",
        ("e.h5ad",),
    ),
    "perturb": Case(
        "launch/perturb.py --checkpoint {RUN} --input {H5AD} --table {DISK}/t.csv "
        f"--output {{DISK}}/t.h5ad --plot {{DISK}}/t.png {PERTURBED} {FEW}",
        ("t.csv", "t.h5ad", "t.png"),
    ),
    "evaluate": Case(
        "launch/evaluate.py --checkpoint {RUN} --store {STORE} --split validation "
        f"--json {{DISK}}/e.json --plot {{DISK}}/plots --by cell_type {FEW}",
        ("e.json", "plots/loss.png", "plots/loss_by_cell_type.png"),
        "replaced",
    ),
    "predict": Case(
        "launch/finetune.py --checkpoint {TUNED} --predict {H5AD} --output {DISK}/p.h5ad",
        ("p.h5ad",),
    ),
    "to-hf": Case("launch/convert.py to-hf {RUN} --out {DISK}/hf", ("hf/model.safetensors",)),
    "from-hf": Case(
        "launch/convert.py from-hf {HF} --vocabulary {STORE}/vocabulary.json --out {DISK}/run",
        ("run/checkpoints/latest",),
    ),
    "vocabulary": Case(
        "data_prep/build_vocabulary.py --out {DISK}/v.json {H5AD}",
        ("v.json",),
    ),
    "partial": Case(
        "data_prep/build_vocabulary.py --partial {DISK}/v.npz {H5AD}",
        ("v.npz",),
    ),
    "split": Case(
        "data_prep/make_split.py {TABLE} --out {DISK}/split.json --held-out-fraction 0.3",
        ("split.json",),
    ),
    "dictionary": Case(
        "data_prep/import_dictionary.py --medians {MEDIANS} --out {DISK}/v.json",
        ("v.json",),
        "replaced",
    ),
    "check_store": Case(
        "data_prep/check_store.py {STORE} --report {DISK}/report",
        ("report/report.json", "report/report.md", "report/lengths_made_up.png"),
        "replaced",
    ),
    "classify": Case(
        "launch/classify.py --checkpoint {RUN} --input {H5AD} --out {DISK}/types --resamples 0 "
        f"--allow-overlap --no-plots {FEW}",
        ("types/results.json", "types/table.md", "types/predictions.csv"),
    ),
}

COSTLY = ("classify", "vocabulary", "dictionary")
"""Three times the forests; and files that are written as others here are."""


@pytest.fixture(scope="module")
def places(store: Path, h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands work on."""
    folder = tmp_path_factory.mktemp("outputs")
    steps = (f"data.store={store}", "train.steps=1", "train.validate_every_steps=0")
    forked.Run(folder / "run", steps).check()
    tune = ("--label=cell_type", f"--checkpoint={folder / 'run'}")
    forked.Run(folder / "tuned", (*steps, *tune)).check(command="finetune")
    weights = plain_bert.random_weights(2, 32, 64, NUM_GENES + 2, 100)
    conversions.write_hf(folder / "hf", weights, 2)
    known = Vocabulary.load(store / "vocabulary.json")
    medians = dict(zip(known.feature_ids, known.medians, strict=True))
    (folder / "medians.json").write_text(json.dumps(medians))
    rows = [f"d{number},assay,tissue,{100 + number}" for number in range(9)]
    head = "dataset_id,assay,tissue_general,n_cells"
    (folder / "table.csv").write_text("\n".join([head, *rows]) + "\n")
    return {
        "RUN": folder / "run",
        "TUNED": folder / "tuned",
        "HF": folder / "hf",
        "STORE": store,
        "H5AD": h5ad,
        "MEDIANS": folder / "medians.json",
        "TABLE": folder / "table.csv",
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk.mounted(tmp_path / "disk", "8m") as disk:
        yield disk


def terminated() -> None:
    """Trouble: SIGTERM comes when a file would take its place."""

    def terminate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    os.replace = os.rename = terminate


def files(disk: Path) -> list[str]:
    return sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())


def assert_refused(ended: CompletedProcess[str], why: str) -> None:
    """By one message and exit code 2."""
    assert ended.returncode == 2, (why, ended.returncode, ended.stderr)
    (message,) = ended.stderr.splitlines()
    assert message.startswith("error: "), (why, message)
    assert "Remedy: " in message, (why, message)


@pytest.mark.parametrize("name", [soak(name) if name in COSTLY else name for name in CASES])
def test_the_same_command_succeeds_after_every_fault(
    name: str, places: dict[str, Path], disk: Path
) -> None:
    case = CASES[name]
    script, *words = case.words.format(DISK=disk, **places).split()
    command = partial(commands.run, script, *words)
    small_disk.make_read_only(disk)
    assert_refused(command(), "read-only")
    small_disk.make_read_only(disk, False)
    filler = small_disk.fill(disk)
    assert_refused(command(), "full")
    filler.unlink()
    assert [path for path in files(disk) if not path.startswith(".")] == []
    ended = command(trouble=terminated)
    assert ended.returncode == -signal.SIGTERM
    assert "Traceback" not in ended.stderr
    assert not set(files(disk)) & set(case.outputs)
    ended = command()
    assert ended.returncode == 0, ended.stderr
    there = files(disk)
    assert set(case.outputs) <= set(there)
    assert not [path for path in there if path.endswith((".partial", ".kept"))]
    before = {path: (disk / path).read_bytes() for path in there}
    again = command()
    if case.again == "refused":
        assert_refused(again, "there already")
        assert {path: (disk / path).read_bytes() for path in files(disk)} == before
    else:
        assert again.returncode == 0, again.stderr
        assert files(disk) == there
