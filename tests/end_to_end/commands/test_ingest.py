"""build_store.py as a user meets it: bad inputs, parts, killed workers, killed builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.split.table import SplitTable
from tests.support import commands
from tests.support.small_cells import flip_bit, random_counts, vocabulary_of, write_h5ad

NUM_GENES, CELLS_A, CELLS_B = 400, 400, 500

SMALL_UNITS = """
import os, signal, sys, time
from pathlib import Path
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.ingest import build as ingest, plan, tokenise
from data_prep.build_store import main
from tests.end_to_end.instants import before

plan.LEAST_ROWS_PER_UNIT = plan.MOST_ROWS_PER_UNIT = 50
ingest._CELLS_PER_WORKER = 1
write_report = tokenise.write_report

def write_report_and_stay(*arguments):
    write_report(*arguments)
    while Path("stay").exists():
        time.sleep(0.01)

tokenise.write_report = write_report_and_stay
if Path("kill").exists():
    place, call = Path("kill").read_text().split()
    before(place, int(call), lambda: os.killpg(0, signal.SIGKILL))
if __name__ == "__main__":
    run(main)
"""

Ended = subprocess.CompletedProcess[str]
Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.h5ad, b.h5ad, v.json and the command with units of 50 rows, build.py."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, CELLS_A, CELLS_B)
    return folder


def write_inputs(folder: Path, cells_a: int, cells_b: int) -> None:
    """Those files."""
    counts = random_counts(np.random.default_rng(4), cells_a + cells_b, NUM_GENES)
    write_h5ad(folder / "a.h5ad", counts[:cells_a], obs={"age": range(cells_a)})
    write_h5ad(folder / "b.h5ad", counts[cells_a:], obs={"kind": ["x"] * cells_b})
    vocabulary_of(NUM_GENES).save(folder / "v.json")
    (folder / "build.py").write_text(SMALL_UNITS)


@pytest.fixture
def command(inputs: Path, tmp_path: Path) -> Command:
    """Runs build.py in a folder of its own, in one process unless said otherwise."""

    def call(*arguments: object, workers: int = 1) -> Ended:
        return commands.run(*words(inputs, workers, *arguments), cwd=tmp_path)

    return call


@pytest.fixture
def refused(command: Command) -> Command:
    """The same of a command that must end with 2."""

    def call(*arguments: object, **more: int) -> Ended:
        ended = command(*arguments, **more)
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr
        return ended

    return call


def words(inputs: Path, workers: int, *arguments: object) -> list[str]:
    given = (inputs / "build.py", "--vocabulary", inputs / "v.json", "--workers", workers)
    return [str(word) for word in (*given, *arguments)]


@pytest.fixture(scope="module")
def clean_hash(
    inputs: Path, files: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The content of a build that nothing disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    commands.check(*words(inputs, 1, "--out", "s", *files), cwd=folder)
    return sound(folder / "s").content_hash


def sound(store: Path) -> Manifest:
    """The manifest of a store, which must be sound."""
    assert check_store(store) == []
    return Manifest.load(store)


@pytest.fixture
def bad(inputs: Path, tmp_path: Path) -> list[str]:
    """Names of two files: one is none of cells; the other, whose row 390 holds -1, opens, and turns
    out bad near its end."""
    (tmp_path / "text.h5ad").write_text("cells")
    shutil.copy(inputs / "a.h5ad", tmp_path / "negative.h5ad")
    with h5py.File(tmp_path / "negative.h5ad", "r+") as file:
        file["X"]["data"][file["X"]["indptr"][390]] = -1
    return ["text.h5ad", "negative.h5ad"]


@pytest.fixture(scope="module")
def files(inputs: Path) -> tuple[Path, Path]:
    return inputs / "a.h5ad", inputs / "b.h5ad"


def test_bad_inputs_are_left_out_and_named_first_and_last(
    command: Command, refused: Command, inputs: Path, tmp_path: Path, bad: list[str]
) -> None:
    (tmp_path / "empty.h5ad").write_text("")
    whole = (inputs / "b.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    bad = [*bad, "empty.h5ad", "cut.h5ad", "missing.h5ad"]
    lines = refused(
        "--out", "s", bad[0], inputs / "a.h5ad", *bad[1:], workers=2
    ).stderr.splitlines()
    head, *named = lines[-6:]
    assert head == "error: 5 of 6 inputs are not in the store:"
    at_once = [line[9:] for line in lines if line.startswith("refused: ")]
    assert sorted(at_once) == sorted(line.strip() for line in named)
    for name in bad:
        assert sum(name in line for line in named) == 1
    assert re.search(r"negative\.h5ad.*row 390 .*-1: negative", "\n".join(lines))
    manifest = sound(tmp_path / "s")
    assert sorted(item["name"] for item in manifest.refused) == sorted(bad)
    assert manifest.cells == CELLS_A
    assert [source["name"] for source in manifest.sources] == ["a.h5ad"]
    # The bad ones have left no trace in the rows.
    assert command("--out", "alone", inputs / "a.h5ad").returncode == 0
    assert Manifest.load(tmp_path / "alone").content_hash == manifest.content_hash


def test_strict_and_no_good_input_make_no_store(
    refused: Command, inputs: Path, tmp_path: Path, bad: list[str]
) -> None:
    good = inputs / "b.h5ad"
    for arguments in (("--strict", bad[0], good), ("--strict", bad[1], good), bad[:1], bad[::-1]):
        printed = refused("--out", "s", *arguments).stderr
        assert re.search(r"^error: .*(text|negative)\.h5ad", printed, re.MULTILINE)
        assert not (tmp_path / "s").exists()


def test_without_a_vocabulary_bad_inputs_are_left_out_too(
    inputs: Path, tmp_path: Path, bad: list[str]
) -> None:
    def build(out: str, *files: object) -> int:
        given = ("data_prep/build_store.py", "--workers", 1, "--out", out, *files)
        return commands.run(*given, cwd=tmp_path).returncode

    assert build("s", *bad, inputs / "b.h5ad") == 2
    assert build("alone", inputs / "b.h5ad") == 0
    found, expected = Manifest.load(tmp_path / "s"), Manifest.load(tmp_path / "alone")
    assert found.content_hash == expected.content_hash
    assert found.vocabulary_hash == expected.vocabulary_hash
    assert len(found.refused) == 2


def test_a_split_by_data_set(
    command: Command, refused: Command, files: tuple[Path, ...], tmp_path: Path
) -> None:
    roles, cells = {"a": "train", "b": "test"}, {"a": CELLS_A, "b": CELLS_B}
    SplitTable("card", 0, 0.5, roles, cells, {}).save(tmp_path / "split.json")
    SplitTable("card", 0, 0.5, {"b": "test"}, {"b": CELLS_B}, {}).save(tmp_path / "less.json")
    assert command("--out", "s", "--split", "split.json", *files).returncode == 0
    rows = {"train": (0, 400), "validation": (400, 400), "test": (400, 900)}
    assert sound(tmp_path / "s").rows == rows
    # A data set without a role is refused before any work.
    printed = refused("--out", "t", "--split", "less.json", *files).stderr
    assert re.search(r"refused: \S+/a\.h5ad: the split names 1 data sets, and ", printed)
    assert Manifest.load(tmp_path / "t").rows["test"] == (0, CELLS_B)


def test_parts_at_once_then_the_whole(
    command: Command, refused: Command, files: tuple[Path, ...], tmp_path: Path, clean_hash: str
) -> None:
    def do(part: int) -> Ended:
        return command("--out", "s", "--part", f"{part}/3", *files)

    with ThreadPoolExecutor() as threads:
        for ended in threads.map(do, (0, 2)):
            assert ended.returncode == 0, ended.stderr
            assert "is done" in ended.stdout
    assert not (tmp_path / "s").exists()
    other = refused("--out", "s", "--part", "1/3", "--seq-length", 99, *files)
    assert "the parts done so far had other arguments: seq_length differ" in other.stderr
    whole = command("--out", "s", *files[::-1])
    assert whole.returncode == 0
    assert "continues: 12 of 18 units of work are there" in whole.stderr
    assert Manifest.load(tmp_path / "s").content_hash == clean_hash
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--part 3/3", "0 <= I < N"),
        ("--part x", "0 <= I < N"),
        ("--part 0/2 --report r", "--report goes with"),
        ("--workers 0", "must be 1 or more"),
        ("--split missing.json", "missing.json: there is no such file"),
        ("--report /proc/x", "/proc/x/report.json: cannot be written"),
    ],
)
def test_options_that_make_no_sense(
    refused: Command, inputs: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    ended = refused("--out", "s", *arguments.split(), inputs / "a.h5ad")
    assert ended.stdout == ""
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_part_needs_a_vocabulary(tmp_path: Path) -> None:
    given = ("data_prep/build_store.py", "--out", "s", "--part", "0/2", "a.h5ad")
    result = commands.run(*given, cwd=tmp_path)
    assert result.returncode == 2
    assert "--part needs --vocabulary" in result.stderr


def test_report(command: Command, files: tuple[Path, ...], tmp_path: Path) -> None:
    result = command("--out", "s", "--report", "r", *files)
    assert result.returncode == 0, result.stderr
    assert "report: r/report.md" in result.stdout
    report = tmp_path / "r"
    names = ["lengths_a.png", "lengths_b.png", "report.json", "report.md"]
    assert sorted(path.name for path in report.iterdir()) == names
    for source in json.loads((report / "report.json").read_text())["sources"]:
        assert sum(source["lengths"]["cells"]) == source["cells_stored"]
    text = (report / "report.md").read_text()
    assert "| a.h5ad | 400 | 400 | 0 | 400 of 400 (100.0%) |" in text
    assert "![b.h5ad](lengths_b.png)" in text
    assert (report / "lengths_a.png").read_bytes().startswith(b"\x89PNG")


# Kills. Where there is a file `stay`, workers stay in the middle of a unit that they have written;
# where there is one `kill`, the whole process group is killed at the instant that it names.


def start(inputs: Path, folder: Path, workers: int = 2) -> subprocess.Popen[str]:
    """The build in a process group of its own."""
    given = words(inputs, workers, "--out", "s", inputs / "a.h5ad", inputs / "b.h5ad")
    return subprocess.Popen(
        [sys.executable, "-W", "error", *given],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def assert_clears(inputs: Path, folder: Path) -> None:
    """A kill after the store had its name leaves its units: the next command clears them."""
    assert "s: exists already" in start(inputs, folder).communicate()[1]
    assert os.listdir(folder) == ["s"]


KILLS = (
    # (place, call), and what is there then of: finished units, the store in the making, its
    # manifest, the mark that it is published, the store.
    ("geneformer_mcore.store.ingest.tokenise:write_report 3", (2, False, False, False, False)),
    ("geneformer_mcore.store.layout:ContentHash.update 1", (18, True, False, False, False)),
    ("geneformer_mcore.store.ingest.staging:sync_tree 1", (18, True, True, False, False)),
    ("geneformer_mcore.store.ingest.staging:StagedFolder._rename 1", (18, True, True, True, False)),
    ("geneformer_mcore.store.ingest.staging:_clear 1", (18, False, False, True, True)),
)
"""Of one start after the other, each of which meets what the ones before have left. Many kills at
random instants: tests/soak/ingest_kills.py."""


def test_killed_at_each_stage_it_ends_as_if_it_had_not_been(
    inputs: Path, tmp_path: Path, clean_hash: str
) -> None:
    staging, store = tmp_path / ".s.staging", tmp_path / "s"
    being_made = staging / "store"
    steps = (being_made, being_made / "manifest.json", staging / "published", store)
    for instant, left in KILLS:
        (tmp_path / "kill").write_text(instant)
        process = start(inputs, tmp_path, workers=1)
        printed = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, printed
        finished = len(list((staging / "units").glob("*.json")))
        assert left == (finished, *(path.exists() for path in steps)), instant
    (tmp_path / "kill").unlink()
    assert sound(store).content_hash == clean_hash
    assert_clears(inputs, tmp_path)


class Staying:
    """A build whose two workers have written a unit each, and stay there."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        (folder / "stay").touch()
        self.process = start(inputs, folder)
        deadline = time.monotonic() + 120
        while len(list(folder.glob(".s.staging/units/*.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(self.process.pid).children()
        self.workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(self.workers) == 2

    def ended(self, code: int) -> str:
        """What it prints until it ends, with its workers."""
        printed = self.process.communicate(timeout=60)[1]
        assert self.process.returncode == code, printed
        assert "Traceback" not in printed
        assert not psutil.wait_procs(self.workers, timeout=60)[1]
        return printed


@pytest.fixture
def staying(inputs: Path, tmp_path: Path) -> Staying:
    return Staying(inputs, tmp_path)


def test_a_killed_worker_is_named_by_its_unit_and_a_second_run_goes_on(
    command: Command, files: tuple[Path, ...], tmp_path: Path, staying: Staying, clean_hash: str
) -> None:
    staying.workers[0].kill()
    printed = staying.ended(1)
    assert re.search(
        r"error: a worker process was ended by signal 9 \(SIGKILL\), as the system does when "
        r"memory runs out, in the middle of rows [\d,]+ to [\d,]+ of \S+[ab]\.h5ad\. Remedy: ",
        printed,
    ), printed
    assert not (tmp_path / "s").exists()
    (tmp_path / "stay").unlink()
    again = command("--out", "s", *files)
    assert again.returncode == 0, again.stderr
    assert "continues: 2 of 18 units of work are there" in again.stderr
    assert Manifest.load(tmp_path / "s").content_hash == clean_hash


def test_an_interrupt_from_the_keyboard_ends_all_and_keeps_the_work(
    tmp_path: Path, staying: Staying
) -> None:
    os.killpg(staying.process.pid, signal.SIGINT)
    printed = staying.ended(130)
    assert "2 finished units of work stay in .s.staging" in printed
    assert printed.endswith("interrupted\n")
    assert sorted(os.listdir(tmp_path / ".s.staging")) == ["lock", "plan.json", "units"]


def test_workers_end_with_a_killed_parent(staying: Staying) -> None:
    staying.process.kill()
    staying.ended(-signal.SIGKILL)


def test_damaged_units_are_done_again(
    command: Command, files: tuple[Path, ...], tmp_path: Path, clean_hash: str
) -> None:
    assert command("--out", "s", "--part", "0/1", *files).returncode == 0
    units = sorted((tmp_path / ".s.staging" / "units").glob("*.arrows"))
    assert len(units) == 18
    flip_bit(units[0], units[0].stat().st_size // 2)
    units[1].write_bytes(units[1].read_bytes()[:-100])
    units[2].unlink()
    report = units[3].with_suffix(".json")
    report.write_text(report.read_text().replace('"cells_cut": 0', '"cells_cut": 1'))
    units[4].with_suffix(".json").unlink()
    (units[0].parent / f".{units[5].stem}.other.99.partial").write_text("half")
    whole = command("--out", "s", *files)
    assert whole.returncode == 0
    # The flipped bit shows when the file is read; the others at once.
    assert "continues: 14 of 18 units of work are there" in whole.stderr
    manifest = Manifest.load(tmp_path / "s")
    assert manifest.content_hash == clean_hash
    assert [source["cells_cut"] for source in manifest.sources] == [0, 0]
    assert os.listdir(tmp_path) == ["s"]
