"""Every file format of ours: an entry that is missing, unknown or of another type is one error that
names the file and the remedy, whatever the entry."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint.record import RECORD, Identity, Record
from geneformer_mcore.config import load
from geneformer_mcore.convert import hf_folder
from geneformer_mcore.errors import CheckpointError, DataError, GeneformerError
from geneformer_mcore.io import schema
from geneformer_mcore.io.files import checksum_of, write_sealed
from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.perturbation.question import read_groups
from geneformer_mcore.report import results
from geneformer_mcore.store.census_download import CensusPlan, CensusUnit, Fetching, Selection
from geneformer_mcore.store.ingest.plan import UnitReport, read_report
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.store.report import Lengths, SourceReport, sources_of
from geneformer_mcore.store.split.table import SplitTable
from geneformer_mcore.tokenizer import tally as tallies
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.gencode import load_symbols
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

HASH = hashlib.sha256(b"").hexdigest()
GENE = "ENSG00000000003"
Content = dict[str, Any]


@dataclass
class Format:
    """content: a sound one;  write: puts one on the disk, sealed where ours are;  read: the reader

    free:    entries whose content is anybody's
    is_strict: whether unknown entries are refused"""

    content: Content
    write: Callable[[Content], object]
    read: Callable[[], object]
    free: frozenset[str] = frozenset()
    is_strict: bool = True


def sealed(path: Path) -> Callable[[Content], None]:
    return lambda content: write_sealed(path, content)


def plain(path: Path) -> Callable[[Content], object]:
    return lambda content: path.write_text(json.dumps(content))


def must(found: object) -> None:
    """For readers that call what they cannot read missing."""
    if found is None or found == "not fetched":
        raise DataError("none. Remedy: again")


def split(tmp: Path) -> Format:
    table = SplitTable("card", 0, 0.1, {"a": "train"}, {"a": 5}, {"tissue": 2})
    table.save(tmp / "split.json")
    content = json.loads((tmp / "split.json").read_text())
    del content["checksum"]
    read = lambda: SplitTable.load(tmp / "split.json")  # noqa: E731
    return Format(content, sealed(tmp / "split.json"), read, frozenset({"counted"}))


def vocabulary(tmp: Path) -> Format:
    path = tmp / "vocabulary.json"
    Vocabulary.from_medians({GENE: 1.0, "ENSG00000000005": 2.0}).save(path)
    content = json.loads(path.read_text())
    return Format(content, plain(path), lambda: Vocabulary.load(path))


def source() -> SourceReport:
    numbers = dict.fromkeys(
        (name for name, kind in SourceReport.__annotations__.items() if kind == "Count"), 1
    )
    shares = dict.fromkeys(("tokens_mean", "tokens_median", "tokens_p5", "tokens_p95"), 2.0)
    texts = {"name": "a", "counts_location": "X", "gene_ids_location": "index"}
    lists: dict[str, Any] = {"passed_over": ["raw"], "obs_columns_left_out": ["b"]}
    rest: dict[str, Any] = {"counts_covered": 0.5, "skipped": {"empty": 1}}
    return SourceReport(**numbers, **shares, **texts, **lists, **rest, lengths=Lengths(2, [1, 2]))


def manifest_of(tmp: Path) -> Manifest:
    rows = {"train": (0, 3), "validation": (3, 4), "test": (4, 5)}
    return Manifest(
        *(5, 50, rows, 16, HASH, HASH, {"tissue": "string"}, {"policy": "random"}),
        *([asdict(source())], {"empty": 1}, {"numpy": "2"}, [{"name": "x", "reason": "y"}]),
        files={"a": (5, HASH), "b": (6, None)},
    )


def manifest(tmp: Path) -> Format:
    content = json.loads(json.dumps(asdict(manifest_of(tmp))))
    del content["refused"][0]["reason"]  # free, as its names are
    free = frozenset({"split", "sources"})
    write = sealed(tmp / "manifest.json")
    return Format(content, write, lambda: Manifest.load(tmp), free)


def source_report(tmp: Path) -> Format:
    content = json.loads(json.dumps(asdict(manifest_of(tmp))))

    def write(changed: Content) -> None:
        write_sealed(tmp / "manifest.json", content | {"sources": [changed]})

    return Format(asdict(source()), write, lambda: sources_of(Manifest.load(tmp)))


UNIT = CensusUnit("a.0000", "a", 5, 0, 9)


def census_plan(tmp: Path) -> Format:
    plan = CensusPlan(Selection(), "2025", "s3://x", (UNIT,), (("a", "10x", "lung", 5),))
    content = json.loads(json.dumps({"version": 1, **asdict(plan)}))
    return Format(content, sealed(tmp / "plan.json"), lambda: CensusPlan.load(tmp))


def census_record(tmp: Path) -> Format:
    fetching = Fetching(tmp, ("s3://x", ""))
    (tmp / "done").mkdir()
    (tmp / UNIT.file).write_bytes(b"")
    content = {"of": fetching._identity(UNIT), "bytes": 0, "sha256": HASH}
    path = tmp / "done" / "a.0000.json"
    return Format(content, sealed(path), lambda: must(fetching.problem(UNIT) or True))


def unit(tmp: Path) -> Format:
    report = UnitReport(HASH, [0, 5], 3, {"train": 3}, 9, {"a": 1}, 5.0, 4.0, 0, [0, 3], ["d"])
    (tmp / "u.arrows").write_bytes(b"\0" * report.num_bytes)
    return Format(asdict(report), sealed(tmp / "u.json"), lambda: must(read_report(tmp, "u")))


def flat_copy(tmp: Path) -> Format:
    arrays = {
        "offsets.bin": np.array([0, 2], "<i8").tobytes(),
        "keys.bin": np.array([7], "<u8").tobytes(),
        "sums.bin": hashlib.sha256(b"\0" * 4).digest(),
    }
    for name, raw in (arrays | {"tokens.bin": b"\0" * 4}).items():
        (tmp / name).write_bytes(raw)
    sums = {name: hashlib.sha256(raw).hexdigest() for name, raw in arrays.items()}
    content = {"format_version": 1, "content_hash": HASH, "cells": 1, "sha256": sums}
    return Format(content, sealed(tmp / "flat.json"), lambda: FlatCopy(tmp, HASH))


def checkpoint(tmp: Path) -> Format:
    staging = checkpoints.make_staging(tmp, 5)
    (staging / "a").write_text("x")
    step = checkpoints.commit(staging, tmp, 5)
    content = json.loads((step / "manifest.json").read_text())
    del content["checksum"]
    return Format(content, sealed(step / "manifest.json"), lambda: checkpoints.verify(step))


def record(tmp: Path) -> Format:
    identity = Identity(load(None)[1], {"train.seed": "x"}, "v", "c")
    found = Record(5, 80, {}, identity, {"tensor": 1}, {"torch": "2"}, {}, 1.5)
    free = frozenset({"meters", "guard", "task"})
    return Format(asdict(found), plain(tmp / RECORD), lambda: Record.load(tmp), free)


def meters(tmp: Path) -> Format:
    path = tmp / "meters.json"
    read = lambda: Meter(None, 8, 1).load_state_dict(json.loads(path.read_text()))  # noqa: E731
    return Format(Meter(None, 8, 1).state_dict(), plain(path), read)


def tally(tmp: Path) -> Format:
    path = tmp / "part.npz"
    options = {"layer": "", "allow_normalised": False, "symbols": None}
    file = asdict(tallies.FileRecord("a", 1.0, 2, 2, 5))
    arrays = {"offsets": np.array([0, 2]), "values": np.array([1.0, 2.0])}
    content: Content = {
        "format": tallies.FORMAT,
        "version": tallies.VERSION,
        "exact": True,
        "options": options,
        "files": [file],
        "genes": [GENE],
        "names": {GENE: "TSPAN6"},
    }

    def write(header: Content) -> None:
        header = header | {"checksum": tallies._checksum(header, arrays)}
        raw = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, header=raw, **arrays)

    return Format(content, write, lambda: tallies.load_tally(path, 10), frozenset({"options"}))


def hugging_face(tmp: Path) -> Format:
    numbers = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"intermediate_size": 8, "max_position_embeddings": 8, "model_type": "bert"}
    content = {**numbers, **rest, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    read = lambda: hf_folder.read_config(tmp)  # noqa: E731
    return Format(content, plain(tmp / "config.json"), read, is_strict=False)


def groups(tmp: Path) -> Format:
    path = tmp / "groups.json"
    return Format({"T": ["CD3D"]}, plain(path), lambda: read_groups(path), is_strict=False)


def symbols(tmp: Path) -> Format:
    path = tmp / "symbols.json"
    return Format({"A": GENE}, plain(path), lambda: load_symbols(path), is_strict=False)


def medians(tmp: Path) -> Format:
    path = tmp / "medians.json"
    return Format({GENE: 1.5}, plain(path), lambda: import_dictionary(path), is_strict=False)


FORMATS = (
    *(split, vocabulary, manifest, source_report, census_plan, census_record, unit, flat_copy),
    *(checkpoint, record, meters, tally, hugging_face, groups, symbols, medians),
)
OTHERS: tuple[Any, ...] = (None, -1, 1.5, "x", [], {}, True, 10**30, float("nan"), ["x"], {"x": 1})
"""Entries in place of sound ones."""


def places(content: Any, free: frozenset[str]) -> Iterator[tuple[Any, ...]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (key,)
        if isinstance(value, dict | list) and key not in free:
            yield from ((key, *rest) for rest in places(value, free))


def changed(content: Content, place: tuple[Any, ...], *value: Any) -> Content:
    """`content` with `value` there, or with nothing there."""
    whole = copy.deepcopy(content)
    inner: Any = whole
    for key in place[:-1]:
        inner = inner[key]
    if value:
        inner[place[-1]] = value[0]
    else:
        del inner[place[-1]]
    return whole


def problem(form: Format, content: Content) -> str | None:
    """The message with which it is refused; None if it is read."""
    form.write(content)
    try:
        form.read()
    except GeneformerError as error:
        return str(error)
    return None


def is_another_kind(value: Any, sound: Any) -> bool:
    if isinstance(sound, float):
        return isinstance(value, str | list | dict | bool)
    return value is not None and not isinstance(value, type(sound) | float)


@pytest.mark.parametrize("make", FORMATS)
def test_every_entry_of_every_format_is_checked(make: Callable[[Path], Format], tmp_path) -> None:
    form = make(tmp_path)
    assert problem(form, form.content) is None, "sound"
    for place in places(form.content, form.free):
        sound: Any = form.content
        for key in place:
            sound = sound[key]
        is_free = place[-1] in form.free
        for value in OTHERS:
            message = problem(form, changed(form.content, place, value))
            if is_another_kind(value, sound) and sound is not None and not is_free:
                assert message, (place, value)
        problem(form, changed(form.content, place))
    if form.is_strict:
        message = problem(form, {**form.content, "of_a_later_version": 1})
        assert message, "one more entry"


@pytest.mark.parametrize("make", [split, manifest, census_plan, record])
def test_a_later_version_is_named_with_the_remedy(
    make: Callable[[Path], Format], tmp_path: Path
) -> None:
    form = make(tmp_path)
    message = problem(form, {**form.content, "newer": 1})
    assert message is not None
    assert "not known to this version" in message
    assert "newer" in message
    assert "Remedy" in message


NO_JSON = {
    "nothing": b"",
    "half": b'{"a": 1',
    "nested too deeply": b"[" * 2000,
    "objects nested too deeply": b'{"a":' * 2000,
    "an endless number": b'{"a": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "no text": bytes(range(256)),
}


@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("make", [form for form in FORMATS if form not in (tally, meters)])
def test_what_is_no_json_is_refused(
    make: Callable[[Path], Format], raw: bytes, tmp_path: Path
) -> None:
    form = make(tmp_path)
    form.write(form.content)
    (path,) = [path for path in tmp_path.rglob("*.json") if path.name != "x"]
    path.write_bytes(raw)
    with pytest.raises(GeneformerError):
        form.read()


def test_names_of_a_vocabulary_are_text() -> None:
    for name in (None, 5, ["a"]):
        with pytest.raises(DataError, match="names must be text"):
            Vocabulary((GENE,), (name,), (1.0,))  # type: ignore[arg-type]


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(schema, "MOST_BYTES", 1000)
    (tmp_path / "a.json").write_bytes(b" " * 1001)
    (tmp_path / "b.json").write_bytes(gzip.compress(b" " * 100_000))
    for name in ("a.json", "b.json"):
        with pytest.raises(CheckpointError, match="more than 1,000 bytes"):
            schema.read_json(tmp_path / name, "none", CheckpointError)


MARK = b"\xef\xbb\xbf"
AS_PEOPLE_HAVE_THEM = {
    "s.json": MARK + json.dumps({"A": GENE}).encode(),
    "s.pkl": pickle.dumps({"A": GENE}, 4),
    "s.json.gz": gzip.compress(json.dumps({"A": GENE}).encode()),
    "s.csv": MARK + f"{GENE},A\n".encode(),
    "s.tsv": f"{GENE}\tA\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_THEM)
def test_symbols_marked_zipped_and_with_tabs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(AS_PEOPLE_HAVE_THEM[name])
    assert load_symbols(tmp_path / name) == {"A": GENE}


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("g.json", MARK + b'{"T": ["A", "B"]}'),
        ("g.gmt", MARK + b"T\tx\tA\tB\n"),
        ("g.gmt.gz", gzip.compress(b"T\tx\tA\tB\n")),
        ("g.txt", b'{"T": ["A", "B"]}'),
    ],
)
def test_groups_marked_and_zipped(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    assert read_groups(tmp_path / name) == {"T": ["A", "B"]}


def test_tables_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text(f'{GENE},"A\n' + "x" * 200_000)
    with pytest.raises(DataError, match="field larger than field limit"):
        load_symbols(path)
    for text, what in (("\tx\tG", "a group has no name"), ('{"T": []}', "group T has no gene")):
        path.write_text(text)
        with pytest.raises(DataError, match=what):
            read_groups(path)


def test_a_tally_whose_arrays_do_not_fit(tmp_path: Path) -> None:
    """Keys beyond the bins would be written beyond an array."""
    form = tally(tmp_path)
    header = form.content | {"exact": False}
    for changes in (
        {"keys": [40_000]},
        {"offsets": [0, 2]},
        {"offsets": [-1, 1]},
        {"counts": [1, 2]},
    ):
        parts: Any = {"offsets": [0, 1], "keys": [5], "counts": [1]} | changes
        kinds = {"offsets": np.int64, "keys": np.uint16, "counts": np.uint32}
        arrays = {name: np.array(parts[name], kind) for name, kind in kinds.items()}
        sealed_header = header | {"checksum": tallies._checksum(header, arrays)}
        raw = np.frombuffer(json.dumps(sealed_header).encode(), np.uint8)
        np.savez(tmp_path / "part.npz", header=raw, **arrays)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="not a whole partial file"):
            form.read()


def test_damaged_lines_of_a_run_are_left_out(tmp_path: Path) -> None:
    good = {"step": 1, "loss": 2.0, "step_s": None, "cells_per_s": 5.0}
    lines = [json.dumps(good), "[" * 5000, '{"step": 2, "loss": "x", "cells_per_s": []}', "{"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "outcome.json").write_text('{"exit_code": true, "outcome": 5, "reason": []}')
    (tmp_path / "baselines.json").write_text('{"unigram": NaN}')
    found = results.load(tmp_path)
    assert found.train.losses == [2.0]
    assert found.outcome["outcome"] == "unknown"
    assert found.baselines is None
    assert "NOT FINISHED" in results.text(found)


def test_checksums_are_of_what_was_written(tmp_path: Path) -> None:
    """A wrong entry under a right checksum is found by its type, not by the checksum."""
    form = split(tmp_path)
    wrong = changed(form.content, ("table", "roles", "a"), 5)
    (tmp_path / "split.json").write_text(json.dumps(wrong | {"checksum": checksum_of(wrong)}))
    with pytest.raises(DataError, match=r"split\.json: table\.roles\['a'\] must be text, and is 5"):
        form.read()
