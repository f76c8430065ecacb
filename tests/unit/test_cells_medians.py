"""Medians of a corpus, exact or not, and the vocabulary they make."""

from __future__ import annotations

import json
from multiprocessing import Value
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer import build
from geneformer_mcore.tokenizer.build import build_vocabulary, gather, merge_parts
from geneformer_mcore.tokenizer.corpus import InputOptions, describe_other_ids
from geneformer_mcore.tokenizer.medians import RELATIVE_ERROR
from geneformer_mcore.tokenizer.tally import FileRecord, Tally, load_tally, save_tally
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.small_cells import block_of, gene_id, random_counts, write_h5ad

NEVER_GB = 1e-7
"""Room for four values: histograms."""


def plain_medians(dense: np.ndarray, ids: list[str]) -> dict[str, float]:
    distinct = sorted({gene for gene in ids if gene})
    summed = np.zeros((len(dense), len(distinct)))
    for column, gene in enumerate(ids):
        if gene:
            summed[:, distinct.index(gene)] += dense[:, column]
    scaled = summed / dense.sum(axis=1, keepdims=True) * 10_000
    return {
        gene: float(np.median(values[values > 0]))
        for gene, values in zip(distinct, scaled.T, strict=True)
        if np.any(values > 0)
    }


def medians_of(tally: Tally) -> dict[str, float]:
    vocabulary = tally.vocabulary()
    return dict(zip(vocabulary.feature_ids, vocabulary.medians, strict=True))


def test_medians_over_files_and_blocks(rng: np.random.Generator) -> None:
    counts = random_counts(rng, 90, 30, density=0.1)
    ids = [gene_id(number % 25) for number in range(30)]
    ids[3] = ""
    counts = sparse.csr_matrix(counts.toarray() * (np.arange(30) != 7))  # Gene 7: never expressed.
    tally = Tally({}, 1 << 40)
    tally.add_file(FileRecord("a", 1.0))
    tally.add_block(block_of(counts[:20]), tally.places(ids))
    tally.add_block(block_of(counts[20:50]), tally.places(ids))
    # Another file has its columns the other way round.
    tally.add_file(FileRecord("b", 1.0))
    reversed_counts = sparse.csr_matrix(counts[50:].toarray()[:, ::-1])
    tally.add_block(block_of(reversed_counts), tally.places(ids[::-1]))
    expected = plain_medians(counts.toarray().astype(np.float64), ids)
    assert medians_of(tally) == expected
    assert gene_id(7) not in expected
    assert [file.cells for file in tally.files] == [50, 40]


def test_nothing_expressed_is_refused() -> None:
    with pytest.raises(DataError, match="no cell expresses a gene"):
        Tally({}, 1).vocabulary()


def test_vocabulary_of_files(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 40, 12)
    symbols = [f"S{number}" for number in range(12)]
    first = write_h5ad(tmp_path / "a.h5ad", counts[:15], var={"gene_symbol": symbols})
    second = write_h5ad(
        tmp_path / "b.h5ad",
        counts[15:],
        gene_ids=symbols,
        var={"ensembl_id": [f"{gene_id(number)}.4" for number in range(12)]},
    )
    vocabulary = build_vocabulary([first, second], InputOptions())
    ids = [gene_id(number) for number in range(12)]
    expected = plain_medians(counts.toarray().astype(np.float64), ids)
    assert dict(zip(vocabulary.feature_ids, vocabulary.medians, strict=True)) == expected
    assert vocabulary.names == tuple(symbols)
    assert build_vocabulary([second, first], InputOptions()) == vocabulary


def test_other_ids_are_told_but_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 30, 4, density=0.9)
    ids = ["TP53", "YAL001C", "FBgn0000001", gene_id(1)]
    file = write_h5ad(tmp_path / "a.h5ad", counts, gene_ids=ids)
    vocabulary = build_vocabulary([file], InputOptions())
    assert set(vocabulary.feature_ids) == set(ids)
    told = describe_other_ids(vocabulary)
    assert told is not None
    assert "3 of 4 gene ids look like symbols" in told
    assert "(FBgn0000001, TP53, YAL001C)" in told
    assert "--symbols FILE" in told
    mostly = Vocabulary.from_medians({gene_id(1): 1.0, gene_id(2): 1.0, "TP53": 1.0})
    assert describe_other_ids(mostly) is None
    mouse = Vocabulary.from_medians({"ENSMUSG00000059552": 1.0})
    assert describe_other_ids(mouse) is None


def test_ids_of_two_kinds_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 5, 3)
    first = write_h5ad(tmp_path / "a.h5ad", counts)
    second = write_h5ad(tmp_path / "b.h5ad", counts, gene_ids=["TP53", "MYC", "GATA1"])
    with pytest.raises(DataError, match=r"b\.h5ad names 0%.*--symbols"):
        build_vocabulary([first, second], InputOptions())
    symbols = {"TP53": gene_id(0), "MYC": gene_id(1)}
    vocabulary = build_vocabulary([first, second], InputOptions(symbols=symbols))
    assert set(vocabulary.feature_ids) <= {gene_id(number) for number in range(3)}


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Four files of different genes, in different orders, one of them with repeated genes."""
    paths = []
    for number in range(4):
        ids = [gene_id(int(gene)) for gene in rng.permutation(60)[: 20 + 5 * number]]
        ids[-1] = ids[0] if number == 2 else ids[-1]
        names = [f"S{gene}-{number}" for gene in ids]
        counts = random_counts(rng, 30 + number, len(ids), density=0.4)
        path = tmp_path / f"{number}.h5ad"
        paths.append(write_h5ad(path, counts, var={"ensembl_id": ids, "gene_symbol": names}))
    return paths


@pytest.mark.parametrize("memory_gb", [4.0, NEVER_GB])
def test_workers_parts_and_order_do_not_matter(
    corpus: list[Path], tmp_path: Path, memory_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = InputOptions()
    whole = build_vocabulary(corpus, options, memory_gb)
    method = "exact" if memory_gb == 4 else "histograms"
    assert whole.origin is not None
    assert (whole.origin["method"], whole.origin["cells"]) == (method, 126)
    assert whole.origin["files"][1] == {"name": "1.h5ad", "cells": 31}
    monkeypatch.setattr("geneformer_mcore.tokenizer.build.ROWS_PER_UNIT", 7)
    seen = []
    by_workers = build_vocabulary(
        corpus[::-1], options, memory_gb, workers=2, progress=lambda *news: seen.append(news)
    )
    assert by_workers == whole
    assert by_workers.origin == whole.origin
    assert seen
    assert {(what, total) for what, _, total in seen} == {("counting", 126)}
    # Parts of every kind: of values and of histograms, one of them itself merged.
    memories = (4.0, NEVER_GB, 4.0) if memory_gb < 1 else (4.0, 4.0, 4.0)
    shares = ([corpus[3], corpus[0]], [corpus[2]], [corpus[1]])
    parts = [tmp_path / f"part{number}.npz" for number in range(3)]
    for path, memory, share in zip(parts, memories, shares, strict=True):
        save_tally(gather(share, options, memory), path)
    save_tally(merge_parts(parts[:2], memory_gb), tmp_path / "both.npz")
    merged = merge_parts([parts[2], tmp_path / "both.npz"], memory_gb).vocabulary()
    assert merged == whole
    assert merged.origin == whole.origin


def test_histograms_are_within_the_bound_of_exact(corpus: list[Path]) -> None:
    exact = build_vocabulary(corpus, InputOptions())
    rough = build_vocabulary(corpus, InputOptions(), NEVER_GB)
    assert rough.feature_ids == exact.feature_ids
    assert rough != exact
    np.testing.assert_allclose(rough.medians, exact.medians, rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert (exact.origin or {})["relative_error"] == 0
    assert (rough.origin or {})["relative_error"] == RELATIVE_ERROR


def test_equal_tallies_make_equal_partial_files(corpus: list[Path], tmp_path: Path) -> None:
    for memory_gb in (4.0, NEVER_GB):
        one = gather(corpus, InputOptions(), memory_gb)
        parts = [gather([path], InputOptions(), memory_gb) for path in corpus[::-1]]
        for part in parts[1:]:
            parts[0].absorb(part)
            parts[0].add_rows(part.files)
        parts[0].files.sort(key=lambda file: file.name)
        for name, tally in (("a.npz", one), ("b.npz", parts[0])):
            save_tally(tally, tmp_path / name)
        with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
            assert first.files == second.files
            headers = [json.loads(file["header"].tobytes()) for file in (first, second)]
            assert headers[0] == headers[1]
            for name in set(first.files) - {"header"}:
                np.testing.assert_array_equal(first[name], second[name])


def test_a_worker_s_error_is_the_command_s(corpus: list[Path]) -> None:
    bad = write_h5ad(corpus[0].with_name("5.h5ad"), sparse.csr_matrix([[1.0, -2.0]]))
    with pytest.raises(DataError, match=r"5\.h5ad: X must hold counts.*holds -2"):
        gather([*corpus, bad], InputOptions(), workers=2)


def test_the_same_counts_twice_are_refused(corpus: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(corpus[1].read_bytes())
    with pytest.raises(DataError, match=r"1\.h5ad and .*copy\.h5ad hold the same .* 31 cells"):
        build_vocabulary([*corpus, copy], InputOptions())
    save_tally(gather(corpus[:2], InputOptions()), tmp_path / "a.npz")
    save_tally(gather(corpus[1:], InputOptions()), tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"hold the same .* Remedy: give each file once"):
        merge_parts([tmp_path / "a.npz", tmp_path / "b.npz"]).vocabulary()
    # The same path twice is one file.
    assert build_vocabulary([*corpus, corpus[1]], InputOptions()) == build_vocabulary(
        corpus, InputOptions()
    )


def test_parts_that_do_not_fit_are_refused(
    corpus: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    save_tally(gather(corpus[:1], InputOptions()), tmp_path / "a.npz")
    save_tally(gather(corpus[1:2], InputOptions(allow_normalised=True)), tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"b\.npz was made with .*'allow_normalised': True"):
        merge_parts([tmp_path / "a.npz", tmp_path / "b.npz"])
    symbols = write_h5ad(tmp_path / "s.h5ad", random_counts(rng, 5, 3), gene_ids=list("XYZ"))
    no_table = InputOptions(default_symbols=lambda: None)
    save_tally(gather([symbols], no_table), tmp_path / "s.npz")
    with pytest.raises(DataError, match="one vocabulary takes one kind of id"):
        merge_parts([tmp_path / "a.npz", tmp_path / "s.npz"])
    with pytest.raises(DataError, match="no partial file"):
        merge_parts([])
    with pytest.raises(DataError, match=r"x\.npz: there is no such file"):
        merge_parts([tmp_path / "x.npz"])


@pytest.mark.parametrize("memory_gb", [4.0, NEVER_GB])
def test_damaged_parts_are_refused(
    corpus: list[Path], tmp_path: Path, memory_gb: float, rng: np.random.Generator
) -> None:
    path = tmp_path / "a.npz"
    save_tally(gather(corpus[:1], InputOptions(), memory_gb), path)
    whole, expected = path.read_bytes(), medians_of(load_tally(path, 1))
    refused = []
    for _ in range(150):
        raw = bytearray(whole)
        raw[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        try:
            # Some bytes of a zip file say nothing of its content: dates, rights.
            assert medians_of(load_tally(path, 1)) == expected
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 120
    assert all("Remedy: make it again" in message for message in refused)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a whole partial file"):
            load_tally(path, 1)


def test_changed_parts_are_refused(corpus: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_tally(gather(corpus[:1], InputOptions()), path)
    with np.load(path) as members:
        arrays = {name: members[name] for name in members.files}
    header = arrays["header"].tobytes().replace(b'"cells": 30', b'"cells": 31')
    for changed in (
        {"header": np.frombuffer(header, np.uint8)},
        {"values": arrays["values"] * (1 + 1e-9)},
    ):
        np.savez(path, **(arrays | changed))
        with pytest.raises(DataError, match="does not fit its checksum"):
            load_tally(path, 1)
    np.savez(path, **arrays)
    assert load_tally(path, 1).cells == 30


def test_workers_share_the_room_for_values(corpus: list[Path]) -> None:
    for held_by_others, is_exact in ((0, True), (1_000, False)):
        counted: list[int] = []
        with build.Counting(InputOptions(), 1_000) as work:
            work.shared = Value("q", held_by_others)
            work(build.Unit(str(corpus[0]), 0, 30), counted.append)
            tally = work(build.HAND_OVER, counted.append)
        assert (tally.cells, tally.collector.is_exact) == (30, is_exact)
        assert sum(counted) == 30
        assert work.shared.value == held_by_others + tally.collector.num_values


def test_parts_of_another_version_are_refused(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geneformer_mcore.tokenizer.tally.VERSION", 2)
    save_tally(gather(corpus[:1], InputOptions()), tmp_path / "a.npz")
    monkeypatch.undo()
    with pytest.raises(DataError, match="version 2, this program reads 1"):
        load_tally(tmp_path / "a.npz", 1)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="not a whole partial file"):
        load_tally(tmp_path / "other.npz", 1)


def test_origin_is_kept_checked_and_no_part_of_the_identity(
    corpus: list[Path], tmp_path: Path
) -> None:
    vocabulary = build_vocabulary(corpus, InputOptions())
    path = tmp_path / "v.json"
    vocabulary.save(path)
    assert Vocabulary.load(path).origin == vocabulary.origin
    plain = Vocabulary(vocabulary.feature_ids, vocabulary.names, vocabulary.medians)
    assert plain == vocabulary
    plain.save(tmp_path / "plain.json")
    assert "origin" not in json.loads((tmp_path / "plain.json").read_text())
    assert Vocabulary.load(tmp_path / "plain.json").origin is None
    path.write_text(path.read_text().replace('"cells": 126', '"cells": 127'))
    with pytest.raises(DataError, match="its origin does not fit its checksum"):
        Vocabulary.load(path)
    path.write_text(path.read_text().replace('"origin"', '"orihin"'))
    with pytest.raises(DataError, match="orihin are no parts"):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_gb": 0.0}, "must be above 0"),
        ({"memory_gb": float("nan")}, "must be above 0"),
        ({"workers": 0}, "at least 1 worker, not 0"),
        ({"sources": []}, "no input file"),
    ],
)
def test_wrong_settings(corpus: list[Path], settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gather(**{"sources": corpus, "options": InputOptions()} | settings)  # type: ignore[arg-type]
