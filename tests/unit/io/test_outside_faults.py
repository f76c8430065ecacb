"""A network, a disk, memory that fails: no input is left out for it, and no work is lost."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from geneformer_mcore.errors import DataError, ExternalIOError, LostWorkerError, NetworkError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io import count_matrix
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.count_matrix import RowGroup
from geneformer_mcore.io.retry import raise_if_io_error
from geneformer_mcore.io.soma import unreadable
from geneformer_mcore.store.ingest import plan
from geneformer_mcore.store.ingest.build import build_store, vocabulary_of_inputs
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support import commands
from tests.support.small_cells import random_counts, vocabulary_of, write_h5ad

NUM_GENES, NUM_CELLS = 40, 90
VOCABULARY = vocabulary_of(NUM_GENES)
CURL = "S3: Error while listing: curlCode: 28, Timeout was reached"
HUGE = np._core._exceptions._ArrayMemoryError((1 << 50,), np.dtype(float))
LARGE = np._core._exceptions._ArrayMemoryError((1 << 20,), np.dtype(float))


def numbered(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("name", "error", "kind"),
    [
        ("s3://b/x: obs", RuntimeError(CURL), NetworkError),
        ("s3://b/x", RuntimeError("Error [HTTP Response Code: -1] : curlCode: 6"), NetworkError),
        ("s3://b/x", RuntimeError("Error [HTTP Response Code: 503] SlowDown"), NetworkError),
        ("a.h5ad", TimeoutError("NFS"), NetworkError),
        ("a.h5ad", numbered(errno.ETIMEDOUT), NetworkError),
        ("a.h5ad", numbered(errno.EIO), ExternalIOError),
        ("a.h5ad", numbered(errno.ESTALE), ExternalIOError),
        ("a.h5ad", numbered(errno.EMFILE), ExternalIOError),
        ("a.h5ad", BlockingIOError(errno.EAGAIN, "unable to lock file"), ExternalIOError),
        ("a/soma", RuntimeError("IO Error: cannot read; Input/output error"), ExternalIOError),
        ("a.h5ad", MemoryError(), MemoryError),
        ("a.h5ad", LARGE, MemoryError),
        ("a.h5ad", numbered(errno.ENOMEM), MemoryError),
        ("a/soma", RuntimeError("std::bad_alloc"), MemoryError),
        # The input's own
        ("a.h5ad", HUGE, None),
        ("a.h5ad", OSError("truncated file: eof = 96"), None),
        ("a.h5ad", numbered(errno.EACCES), None),
        ("a.h5ad", KeyError("connection"), None),
        ("network/soma", RuntimeError("file:///network/soma is damaged"), None),
        ("s3://network/x", RuntimeError("'s3://network/x' is not a valid TileDB group."), None),
        ("s3://b/x", RuntimeError("S3: Error [HTTP Response Code: 404]"), None),
        ("s3://b/x", RuntimeError("S3: Error [HTTP Response Code: 403] AccessDenied"), None),
    ],
    ids=str,
)
def test_which_faults_are_no_input_s(name, error, kind) -> None:
    with pytest.raises(kind) if kind else nullcontext() as found:
        raise_if_io_error(name, error)
    assert not kind or (type(found.value), name in str(found.value)) == (kind, True)


def test_a_soma_object_s_error_is_told_apart() -> None:
    damaged = unreadable("s3://b/x", "cannot be read", RuntimeError("Checksum mismatch"))
    assert type(damaged) is DataError
    with pytest.raises(NetworkError, match=r"s3://b/x: the network failed: S3.*curlCode: 28.*same"):
        unreadable("s3://b/x", "cannot be read", RuntimeError(CURL))


def small_units(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "LEAST_ROWS_PER_UNIT", 30)
    patch.setattr(plan, "MOST_ROWS_PER_UNIT", 30)


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> list[Path]:
    """a.h5ad by rows and b.h5ad by columns; units have 30 rows."""
    small_units(monkeypatch)
    counts = random_counts(np.random.default_rng(0), NUM_CELLS, NUM_GENES)
    by_rows = write_h5ad(tmp_path / "a.h5ad", counts)
    by_columns = write_h5ad(tmp_path / "b.h5ad", counts[:50].tocsc())
    return [by_rows, by_columns]


def fail_from_row(row: int, error: Exception) -> Callable[..., CountBlock]:
    read_rows = RowGroup.read_rows

    def read(self: RowGroup, start: int, stop: int) -> CountBlock:
        if stop > row:
            raise error
        return read_rows(self, start, stop)

    return read


def ends_and_goes_on(inputs, tmp_path, patch, kept, kind, message) -> Manifest:
    """A build ends with `kept` of 5 units; once the fault is undone, the next one goes on."""
    with pytest.raises(kind, match=message):
        build_store(inputs, tmp_path / "s", VOCABULARY)
    assert not (tmp_path / "s").exists()
    patch.undo()
    small_units(patch)
    lines: list[str] = []
    manifest = build_store(inputs, tmp_path / "s", VOCABULARY, log=lines.append)
    assert (lines, manifest.refused) == ([f"continues: {kept} of 5 units of work are there"], [])
    return manifest


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionResetError("reset by peer"), NetworkError, "a.h5ad: X: the network failed"),
        (numbered(errno.EIO), ExternalIOError, "a.h5ad: X: reading failed.*Input/output error"),
        (numbered(errno.ENOSPC), ExternalIOError, "a.h5ad: X: reading failed.*No space left"),
        (MemoryError(), LostWorkerError, "not enough memory .*a.h5ad.* fewer `workers=`"),
    ],
    ids=str,
)
def test_a_build_ends_with_its_units_kept_and_goes_on(
    inputs, tmp_path, monkeypatch, error, kind, message
) -> None:
    clean = build_store(inputs, tmp_path / "clean", VOCABULARY)
    monkeypatch.setattr(RowGroup, "read_rows", fail_from_row(60, error))
    whole = ends_and_goes_on(inputs, tmp_path, monkeypatch, 2, kind, message)
    assert whole.content_hash == clean.content_hash


def test_what_an_input_holds_is_its_own_fault(inputs, tmp_path, monkeypatch) -> None:
    error = OSError("Can't read data (inflate() failed)")
    monkeypatch.setattr(RowGroup, "read_rows", fail_from_row(60, error))
    manifest = build_store(inputs, tmp_path / "s", VOCABULARY)
    assert [item["name"] for item in manifest.refused] == ["a.h5ad"]
    assert manifest.cells == 50


def test_a_full_folder_of_temporary_files_ends_the_build(inputs, tmp_path, monkeypatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(count_matrix, "IN_MEMORY_BYTES", 100)
    usage = shutil.disk_usage

    def full(folder: object) -> object:
        return usage("/")._replace(free=10 if "scratch" in str(folder) else 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", full)
    message = r"b\.h5ad: X is stored by columns.*/scratch and .*TMPDI"
    ends_and_goes_on(inputs, tmp_path, monkeypatch, 3, ExternalIOError, message)


def test_no_folder_of_temporary_files_at_all(inputs, monkeypatch) -> None:
    none = Mock(side_effect=FileNotFoundError(errno.ENOENT, "No usable temporary directory found"))
    monkeypatch.setattr(count_matrix, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with (
        InputOptions().open(inputs[1]) as counts,
        pytest.raises(ExternalIOError, match="No usable"),
    ):
        counts.read_rows(0, 3)


def test_the_inputs_own_vocabulary_is_not_made_without_them_either(inputs, monkeypatch) -> None:
    monkeypatch.setattr(RowGroup, "read_rows", fail_from_row(60, numbered(errno.EIO)))
    with pytest.raises(ExternalIOError, match=r"a\.h5ad"):
        vocabulary_of_inputs(inputs, InputOptions())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad"), 2),
        (ExternalIOError("full"), 2),
        (NetworkError("gone"), 75),
        (LostWorkerError("killed"), 1),
    ],
    ids=str,
)
def test_exit_codes(error, code, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(Mock(side_effect=error))
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("bad", "code", "message"),
    [
        ("s3://bucket/experiment", 75, "error: s3://bucket/experiment: the network failed: "),
        # A file whose reading fails with EIO, whoever reads it.
        ("io.h5ad", 2, "error: io.h5ad: reading failed, and not by what the input holds: "),
    ],
)
def test_build_store_stores_nothing_then(inputs, tmp_path, bad, code, message) -> None:
    (tmp_path / "io.h5ad").symlink_to("/proc/self/mem")
    VOCABULARY.save(tmp_path / "v.json")
    words = ["--out", "s", "--vocabulary", "v.json", "a.h5ad", bad]
    # In place of Amazon's servers, a port of this machine on which nothing listens.
    nowhere = {"ENDPOINT_OVERRIDE": "127.0.0.1:9", "CONNECT_MAX_TRIES": "1"}
    environment = {f"TILEDB_VFS_S3_{name}": value for name, value in nowhere.items()}
    program = "data_prep/build_store.py"
    result = commands.run(program, *words, cwd=tmp_path, environment=environment)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "s").exists()
