"""Medians of a corpus, exact or from histograms with their bound, and the vocabulary they make."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from itertools import pairwise
from multiprocessing import Value
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer import build
from geneformer_mcore.tokenizer.build import build_vocabulary, gather, merge_parts
from geneformer_mcore.tokenizer.genes import InputOptions, describe_other_ids
from geneformer_mcore.tokenizer.medians import RELATIVE_ERROR, Histograms, MedianCollector
from geneformer_mcore.tokenizer.tally import FileRecord, Tally, load_tally, save_tally
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support.small_cells import (
    block_of,
    flip_bit,
    gene_id,
    gene_ids,
    random_counts,
    write_h5ad,
)

NEVER_GB = 1e-7
"""Room for four values: histograms."""
OPTIONS = InputOptions()


def plain_medians(counts: sparse.csr_matrix, ids: list[str]) -> dict[str, float]:
    dense = counts.toarray().astype(np.float64)
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


def medians_of(vocabulary: Vocabulary) -> dict[str, float]:
    return dict(zip(vocabulary.feature_ids, vocabulary.medians, strict=True))


def test_medians_over_files_and_blocks(rng) -> None:
    ids = [gene_id(number % 25) for number in range(30)]
    ids[3] = ""
    is_expressed = np.arange(30) != 7
    counts = sparse.csr_matrix(random_counts(rng, 90, 30, density=0.1).toarray() * is_expressed)
    tally = Tally({}, 1 << 40)
    tally.add_file(FileRecord("a", 1.0))
    tally.add_block(block_of(counts[:20]), tally.places(ids))
    tally.add_block(block_of(counts[20:50]), tally.places(ids))
    # Another file has its columns the other way round.
    tally.add_file(FileRecord("b", 1.0))
    tally.add_block(block_of(counts[50:][:, ::-1].tocsr()), tally.places(ids[::-1]))
    expected = plain_medians(counts, ids)
    assert medians_of(tally.vocabulary()) == expected
    assert gene_id(7) not in expected
    assert [file.cells for file in tally.files] == [50, 40]
    with pytest.raises(DataError, match="no cell expresses a gene"):
        Tally({}, 1).vocabulary()


# Vocabularies of files


def test_vocabulary_of_files(tmp_path, rng) -> None:
    counts, ids = random_counts(rng, 40, 12), gene_ids(12)
    symbols = [f"S{number}" for number in range(12)]
    versions = {"ensembl_id": [f"{gene}.4" for gene in ids]}
    first = write_h5ad(tmp_path / "a.h5ad", counts[:15], var={"gene_symbol": symbols})
    second = write_h5ad(tmp_path / "b.h5ad", counts[15:], gene_ids=symbols, var=versions)
    vocabulary = build_vocabulary([first, second], OPTIONS)
    assert medians_of(vocabulary) == plain_medians(counts, ids)
    assert vocabulary.names == tuple(symbols)
    assert build_vocabulary([second, first], OPTIONS) == vocabulary


def test_other_ids_are_reported_but_taken(tmp_path, rng) -> None:
    ids = ["TP53", "YAL001C", "FBgn0000001", gene_id(1)]
    file = write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 30, 4, density=0.9), gene_ids=ids)
    vocabulary = build_vocabulary([file], OPTIONS)
    assert set(vocabulary.feature_ids) == set(ids)
    message = describe_other_ids(vocabulary) or ""
    for part in ("3 of 4 gene ids look like sym", "(FBgn0000001, TP53, YAL001C)", "`symbols=FILE`"):
        assert part in message
    for names in ([gene_id(1), gene_id(2), "TP53"], ["ENSMUSG00000059552"]):
        assert describe_other_ids(Vocabulary.from_medians(dict.fromkeys(names, 1.0))) is None


def test_ids_of_two_kinds_are_refused(tmp_path, rng) -> None:
    counts = random_counts(rng, 5, 3)
    first = write_h5ad(tmp_path / "a.h5ad", counts)
    second = write_h5ad(tmp_path / "b.h5ad", counts, gene_ids=["TP53", "MYC", "GATA1"])
    with pytest.raises(DataError, match=r"b\.h5ad names 0%.*`symbols=FILE`"):
        build_vocabulary([first, second], OPTIONS)
    symbols = {"TP53": gene_id(0), "MYC": gene_id(1)}
    vocabulary = build_vocabulary([first, second], InputOptions(symbols=symbols))
    assert set(vocabulary.feature_ids) <= set(gene_ids(3))


@pytest.fixture
def corpus(tmp_path, rng) -> list[Path]:
    """Four files of different genes, in different orders, one of them with repeated genes."""
    paths = []
    for number in range(4):
        ids = gene_ids(rng.permutation(60)[: 20 + 5 * number].tolist())
        ids[-1] = ids[0] if number == 2 else ids[-1]
        names = [f"S{gene}-{number}" for gene in ids]
        counts = random_counts(rng, 30 + number, len(ids), density=0.4)
        path = tmp_path / f"{number}.h5ad"
        paths.append(write_h5ad(path, counts, var={"ensembl_id": ids, "gene_symbol": names}))
    return paths


@pytest.fixture
def part_of(tmp_path):
    """Writes a partial file of some files."""

    def write(name: str, files: list[Path], *memory_gb: float, options=OPTIONS) -> Path:
        save_tally(gather(files, options, *memory_gb), tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("memory_gb", [4.0, NEVER_GB], ids=["exact", "histograms"])
def test_workers_parts_and_order_do_not_matter(
    corpus, tmp_path, part_of, memory_gb, monkeypatch
) -> None:
    whole = build_vocabulary(corpus, OPTIONS, memory_gb)
    made = ("exact", 0) if memory_gb == 4 else ("histograms", RELATIVE_ERROR)
    origin = whole.origin or {}
    assert (origin["method"], origin["relative_error"], origin["cells"]) == (*made, 126)
    assert origin["files"][1] == {"name": "1.h5ad", "cells": 31}
    monkeypatch.setattr(build, "ROWS_PER_UNIT", 7)
    seen = Mock()
    by_workers = build_vocabulary(corpus[::-1], OPTIONS, memory_gb, workers=2, progress=seen)
    assert (by_workers, by_workers.origin) == (whole, whole.origin)
    assert {call.args[::2] for call in seen.call_args_list} == {("counting", 126)}
    # Parts of every kind: of values and of histograms, one of them itself merged.
    first, both = part_of("first.npz", [corpus[3], corpus[0]]), tmp_path / "both.npz"
    second = part_of("second.npz", [corpus[2]], memory_gb)
    save_tally(merge_parts([first, second], memory_gb), both)
    merged = merge_parts([part_of("third.npz", [corpus[1]]), both], memory_gb).vocabulary()
    assert (merged, merged.origin) == (whole, whole.origin)


@pytest.mark.parametrize("memory_gb", [4.0, NEVER_GB], ids=["exact", "histograms"])
def test_equal_tallies_make_equal_partial_files(corpus, tmp_path, part_of, memory_gb) -> None:
    part_of("a.npz", corpus, memory_gb)
    merged, *others = (gather([path], OPTIONS, memory_gb) for path in corpus[::-1])
    for other in others:
        merged.absorb(other)
        merged.add_rows(other.files)
    merged.files.sort(key=lambda file: file.name)
    save_tally(merged, tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert first.files == second.files
        headers = [json.loads(file["header"].tobytes()) for file in (first, second)]
        assert headers[0] == headers[1]
        for name in set(first.files) - {"header"}:
            np.testing.assert_array_equal(first[name], second[name])


def test_a_worker_s_error_is_the_command_s(corpus) -> None:
    bad = write_h5ad(corpus[0].with_name("5.h5ad"), sparse.csr_matrix([[1.0, -2.0]]))
    with pytest.raises(DataError, match=r"5\.h5ad: X must hold counts.*holds -2"):
        gather([*corpus, bad], OPTIONS, workers=2)


def test_the_same_counts_twice_are_refused(corpus, tmp_path, part_of) -> None:
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(corpus[1].read_bytes())
    with pytest.raises(DataError, match=r"1\.h5ad and .*copy\.h5ad hold the same .* 31 cells"):
        build_vocabulary([*corpus, copy], OPTIONS)
    parts = [part_of("a.npz", corpus[:2]), part_of("b.npz", corpus[1:])]
    with pytest.raises(DataError, match=r"hold the same .* Remedy: give each file once"):
        merge_parts(parts).vocabulary()
    # The same path twice is one file.
    assert build_vocabulary([*corpus, corpus[1]], OPTIONS) == build_vocabulary(corpus, OPTIONS)


def test_workers_share_the_room_for_values(corpus) -> None:
    for held_by_others, is_exact in ((0, True), (1_000, False)):
        counted: list[int] = []
        with build.Counting(OPTIONS, 1_000) as work:
            work.shared = Value("q", held_by_others)
            work(build.Unit(str(corpus[0]), 0, 30), counted.append)
            tally = work(build.HAND_OVER, counted.append)
        assert (tally.cells, tally.collector.is_exact) == (30, is_exact)
        assert sum(counted) == 30
        assert work.shared.value == held_by_others + tally.collector.num_values


@pytest.mark.parametrize(
    ("files", "memory_gb", "workers", "message"),
    [
        (1, 0.0, 1, "must be above 0"),
        (1, float("nan"), 1, "must be above 0"),
        (1, 4.0, 0, "must be 1 or more, not 0"),
        (0, 4.0, 1, "no input given"),
    ],
)
def test_wrong_settings(corpus, files, memory_gb, workers, message) -> None:
    with pytest.raises(DataError, match=message):
        gather(corpus[:files], OPTIONS, memory_gb, workers=workers)


# Partial files


def test_parts_that_do_not_fit_are_refused(corpus, tmp_path, part_of, rng, monkeypatch) -> None:
    a = part_of("a.npz", corpus[:1])
    b = part_of("b.npz", corpus[1:2], options=InputOptions(allow_normalised=True))
    file = write_h5ad(tmp_path / "s.h5ad", random_counts(rng, 5, 3), gene_ids=list("XYZ"))
    no_table = InputOptions(default_symbols=lambda: None)
    symbols = part_of("s.npz", [file], options=no_table)
    monkeypatch.setattr("geneformer_mcore.tokenizer.tally.VERSION", 2)
    of_version_2 = part_of("v.npz", corpus[:1])
    monkeypatch.undo()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for parts, message in (
        ([a, b], r"b\.npz was made with .*'allow_normalised': True"),
        ([a, symbols], "one vocabulary takes one kind of id"),
        ([], "no partial file"),
        ([tmp_path / "x.npz"], r"x\.npz: there is no such file"),
        ([of_version_2], "version 2, this program reads 1"),
        ([tmp_path / "other.npz"], "not a whole partial file"),
    ):
        with pytest.raises(DataError, match=message):
            merge_parts(parts)


@pytest.mark.parametrize("memory_gb", [4.0, NEVER_GB], ids=["exact", "histograms"])
def test_damaged_parts_are_refused(corpus, part_of, memory_gb, rng) -> None:
    path = part_of("a.npz", corpus[:1], memory_gb)
    whole, expected = path.read_bytes(), load_tally(path, 1).vocabulary()
    refused = []
    for _ in range(150):
        flip_bit(path, int(rng.integers(len(whole))), int(rng.integers(8)))
        try:
            # Some bytes of a zip file say nothing of its content: dates, rights.
            assert load_tally(path, 1).vocabulary() == expected
        except DataError as error:
            refused.append(str(error))
        path.write_bytes(whole)
    assert len(refused) > 120
    assert all("Remedy: make it again" in message for message in refused)
    for length in (len(whole) - 1, len(whole) // 2, 10, 0):
        os.truncate(path, length)
        with pytest.raises(DataError, match="not a whole partial file"):
            load_tally(path, 1)


def test_changed_parts_are_refused(corpus, part_of) -> None:
    path = part_of("a.npz", corpus[:1])
    with np.load(path) as members:
        arrays = {name: members[name] for name in members.files}
    header = arrays["header"].tobytes().replace(b'"cells": 30', b'"cells": 31')
    changes = {"header": np.frombuffer(header, np.uint8), "values": arrays["values"] * (1 + 1e-9)}
    for name, changed in changes.items():
        np.savez(path, **(arrays | {name: changed}))
        with pytest.raises(DataError, match="does not fit its checksum"):
            load_tally(path, 1)
    np.savez(path, **arrays)
    assert load_tally(path, 1).cells == 30


def test_origin_is_kept_checked_and_no_part_of_the_identity(corpus, tmp_path) -> None:
    vocabulary = build_vocabulary(corpus, OPTIONS)
    plain, path = replace(vocabulary, origin=None), tmp_path / "v.json"
    assert plain == vocabulary
    plain.save(path)
    assert "origin" not in json.loads(path.read_text())
    assert Vocabulary.load(path).origin is None
    vocabulary.save(path)
    assert Vocabulary.load(path).origin == vocabulary.origin
    for old, new, message in (
        ('"cells": 126', '"cells": 127', "its origin does not fit its checksum"),
        ('"origin"', '"orihin"', "a later one may know it: orihin"),
    ):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(DataError, match=message):
            Vocabulary.load(path)


# Histograms of values

NUM_GENES = 3
VALUES = st.lists(
    st.tuples(
        st.integers(0, NUM_GENES - 1),
        st.floats(2.0**-50, 16_000.0, exclude_min=True)
        | st.integers(1, 9).map(lambda count: count / 2_011 * 10_000),
    ),
    max_size=200,
)


def as_arrays(values: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    places, sizes = zip(*values, strict=True) if values else ((), ())
    return np.array(places, np.int32), np.array(sizes, np.float64)


def histograms_of(values: list[tuple[int, float]]) -> Histograms:
    histograms = Histograms()
    histograms.add_values(*as_arrays(values))
    return histograms


def exact_medians(values: list[tuple[int, float]]) -> np.ndarray:
    sizes_of = [[size for place, size in values if place == gene] for gene in range(NUM_GENES)]
    return np.array([np.median(sizes or [np.nan]) for sizes in sizes_of])


@given(VALUES)
def test_medians_are_within_the_bound(values) -> None:
    found, exact = histograms_of(values).medians(NUM_GENES), exact_medians(values)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    # One more for the rounding of the comparison itself.
    np.testing.assert_allclose(found, exact, rtol=RELATIVE_ERROR * (1 + 2**-40), atol=0)


def test_the_bound_is_reached_and_values_out_of_range_count_as_the_nearest_bin() -> None:
    assert RELATIVE_ERROR == 1 / 1024
    assert histograms_of([(0, 1.0)]).medians(1)[0] == 1 + RELATIVE_ERROR
    found = histograms_of([(0, 1e-300), (1, 2.0**-50), (2, 1e300), (3, 2.0**14 - 1)]).medians(4)
    assert found[0] == found[1] == pytest.approx(2.0**-50, rel=RELATIVE_ERROR)
    assert found[2] == found[3] == pytest.approx(2.0**14, rel=2 * RELATIVE_ERROR)


@given(VALUES, st.lists(st.integers(0, 200), max_size=5), st.randoms(use_true_random=False))
def test_order_and_parts_do_not_matter(values, cuts, random) -> None:
    whole, sums = histograms_of(values), Histograms()
    shuffled = random.sample(values, len(values))
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        if number % 2:
            sums.add_values(*as_arrays(shuffled[start:stop]))
        else:
            sums.add(histograms_of(shuffled[start:stop]).bins())
    found, expected = vars(sums.bins()), vars(whole.bins())
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_array_equal(sums.medians(NUM_GENES), whole.medians(NUM_GENES))


@given(VALUES, st.integers(0, 200))
def test_exact_until_the_limit_and_the_same_beyond(values, limit) -> None:
    collector = MedianCollector(limit)
    for start in range(0, len(values), 7):
        collector.add(*as_arrays(values[start : start + 7]))
    assert collector.num_values == len(values)
    assert collector.is_exact == (len(values) <= limit)
    assert collector.relative_error == (0 if collector.is_exact else RELATIVE_ERROR)
    at_once = histograms_of(values).medians(NUM_GENES)
    expected = exact_medians(values) if collector.is_exact else at_once
    for _ in range(2):
        np.testing.assert_array_equal(collector.medians(NUM_GENES), expected)


def test_many_genes_and_pages(rng) -> None:
    # More pages than are there at first, for genes that come later, added to by each block.
    values = rng.lognormal(1.0, 3.0, 60_000).clip(1e-9, 16_000)
    divisors = 6 - np.arange(60_000) // 10_000
    genes = (rng.integers(0, 900, 60_000) // divisors).astype(np.int32)
    histograms = Histograms()
    for start in range(0, 60_000, 10_000):
        part = slice(start, start + 10_000)
        histograms.add_values(genes[part], values[part])
    exact = [np.median(values[genes == gene]) for gene in range(900)]
    np.testing.assert_allclose(histograms.medians(900), exact, rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert histograms.bins().counts.sum() == 60_000
    again = pickle.loads(pickle.dumps(histograms))
    np.testing.assert_array_equal(again.medians(900), histograms.medians(900))
    again.add_values(genes, values)
    assert again.bins().counts.sum() == 120_000
    assert again.num_bytes >= histograms.num_bytes > 1_000_000
