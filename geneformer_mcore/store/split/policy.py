"""Choice of the data sets that are held out of training, for validation on unseen studies.

    DatasetTable  ->  in the policy's order: not too large? others have its assays and tissues?
                  ->  train | held out (cells assigned to validation and test) | test

card:            data sets in a random order, by a hash of seed and id; one of those held out is
                 kept whole for test (the model card of Geneformer), unless others are named for it
smallest-first:  the smallest data sets first (NVIDIA's way)

Both hold out at most the given share of the cells, and never the last data set in training of an
assay or a tissue. `card` refuses a corpus that lacks these columns, or leaves no data set for test,
unless allow_incomplete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.split.dataset_table import COVERED, Dataset, DatasetTable
from geneformer_mcore.store.split.table import HELD_OUT, REFUSE, TEST, TRAIN, SplitTable

CARD, SMALLEST_FIRST = "card", "smallest-first"
POLICIES = (CARD, SMALLEST_FIRST)


def make_split(
    table: DatasetTable,
    policy: str,
    held_out_fraction: float,
    seed: int = 0,
    test_datasets: Sequence[str] = (),
    validation_share: float = 0.5,
    unlisted: str = REFUSE,
    allow_incomplete: bool = False,
) -> SplitTable:
    """The split of a corpus by `policy` (see choose_roles and SplitTable)."""
    roles = choose_roles(table, policy, held_out_fraction, seed, test_datasets, allow_incomplete)
    known = {label for dataset in table.datasets for label in _labels(dataset)}
    labels = {column: sum(found == column for found, _ in known) for column in COVERED}
    cells = {dataset.dataset_id: dataset.cells for dataset in table.datasets}
    return SplitTable(
        policy, seed, held_out_fraction, roles, cells, labels, validation_share, unlisted
    )


def choose_roles(
    table: DatasetTable,
    policy: str,
    held_out_fraction: float,
    seed: int = 0,
    test_datasets: Sequence[str] = (),
    allow_incomplete: bool = False,
) -> dict[str, str]:
    """{dataset_id: role} of every data set of the table; depends on nothing but the arguments.

    held_out_fraction:  of the cells of all data sets but `test_datasets`, the most to hold out
    test_datasets:      whole data sets for test alone, in addition to that share
    allow_incomplete:   of `card`: cells may lack a covered column, and none may be for test alone
    Raises DataError where nothing can be held out, or training would lack an assay or a tissue.
    """
    _check_arguments(table, policy, held_out_fraction, test_datasets)
    is_strict = policy == CARD and not allow_incomplete
    if is_strict and table.missing:
        raise DataError(_missing_message(table))
    named = [dataset for dataset in table.datasets if dataset.dataset_id in set(test_datasets)]
    rest = [dataset for dataset in table.datasets if dataset.dataset_id not in set(test_datasets)]
    coverage = _Coverage(table.datasets)
    for dataset in named:
        coverage.require_without(dataset)
    most_cells = int(sum(dataset.cells for dataset in rest) * held_out_fraction)
    held_out: list[Dataset] = []
    left = most_cells
    for dataset in sorted(rest, key=lambda one: _order(one, policy, seed)):
        if dataset.cells <= left and coverage.try_without(dataset):
            held_out.append(dataset)
            left -= dataset.cells
    if not held_out:
        raise DataError(_nothing_message(rest, held_out_fraction, most_cells, coverage))
    whole_test = [dataset.dataset_id for dataset in named]
    if policy == CARD and not named and len(held_out) > 1:
        whole_test = [held_out[0].dataset_id]
    if is_strict and not whole_test:
        raise DataError(_no_test_message(rest, held_out[0], most_cells))
    roles = {dataset.dataset_id: TRAIN for dataset in table.datasets}
    roles |= {dataset.dataset_id: HELD_OUT for dataset in held_out}
    return roles | dict.fromkeys(whole_test, TEST)


def _order(dataset: Dataset, policy: str, seed: int) -> tuple[int, str]:
    if policy == SMALLEST_FIRST:
        return dataset.cells, dataset.dataset_id
    digest = blake2b(f"{seed}\0{dataset.dataset_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little"), dataset.dataset_id


class _Coverage:
    """The number of training data sets in which each label occurs."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._number = Counter(label for dataset in datasets for label in _labels(dataset))

    def alone_with(self, dataset: Dataset) -> list[tuple[str, str]]:
        """(column, label) that no other data set of training has."""
        return [label for label in _labels(dataset) if self._number[label] <= 1]

    def try_without(self, dataset: Dataset) -> bool:
        """Takes the data set out of training, unless a label would go with it."""
        if self.alone_with(dataset):
            return False
        self._number.subtract(_labels(dataset))
        return True

    def require_without(self, dataset: Dataset) -> None:
        """The same; DataError if a label would go with it."""
        alone = self.alone_with(dataset)
        if not self.try_without(dataset):
            listed = ", ".join(f"{column} {label!r}" for column, label in alone[:3])
            raise DataError(
                f"data set {dataset.dataset_id} cannot be kept for test: {len(alone)} of its "
                f"labels ({listed}) occur in no other data set of training, and every "
                f"{' and '.join(COVERED)} must. Remedy: name another `test_datasets=`, or add data."
            )


def _labels(dataset: Dataset) -> list[tuple[str, str]]:
    return sorted((column, label) for column, found in dataset.labels.items() for label in found)


def _check_arguments(
    table: DatasetTable, policy: str, held_out_fraction: float, test_datasets: Sequence[str]
) -> None:
    if policy not in POLICIES:
        raise DataError(f"no policy {policy!r}; there are {', '.join(POLICIES)}.")
    if not 0 < held_out_fraction < 1:
        raise DataError(
            f"the share of cells to hold out must lie between 0 and 1, not {held_out_fraction:g}."
        )
    known = [dataset.dataset_id for dataset in table.datasets]
    unknown = sorted(set(test_datasets) - set(known))
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(set(test_datasets))} data sets named for test are not there: "
            f"{', '.join(unknown[:3])}; there are {len(known):,}: {', '.join(known[:3])}, ... "
            "Remedy: check the ids."
        )


def _missing_message(table: DatasetTable) -> str:
    lacking = ", ".join(f"{source} has no {column}" for column, source in table.missing.items())
    return (
        f"the policy card keeps every {' and '.join(COVERED)} of the {table.cells:,} cells in "
        f"training, and {len(table.missing)} of these {len(COVERED)} columns cannot be seen to: "
        f"{lacking}. Remedy: give obs the columns, leave it out, or `allow_incomplete=True`."
    )


def _no_test_message(rest: Sequence[Dataset], only: Dataset, most_cells: int) -> str:
    return (
        "the policy card keeps one data set of those held out whole for test and another for "
        f"validation, and of {len(rest):,} data sets only 1 can be held out ({only.dataset_id}, "
        f"{only.cells:,} of {most_cells:,} cells that may be). Remedy: name `test_datasets=`, "
        "a larger `held_out_fraction=`, or `allow_incomplete=True` for a split without one."
    )


def _nothing_message(
    rest: Sequence[Dataset], fraction: float, most_cells: int, coverage: _Coverage
) -> str:
    total = sum(dataset.cells for dataset in rest)
    share = f"{fraction:.4g} of {total:,} cells is {most_cells:,}"
    free = [dataset for dataset in rest if not coverage.alone_with(dataset)]
    if not free:
        return (
            f"no data set can be held out: each of the {len(rest):,} is the only one in training "
            f"of some {' or '.join(COVERED)}. Remedy: add data sets, or split by cell "
            "(build_store.py without --split)."
        )
    smallest = min(free, key=lambda dataset: (dataset.cells, dataset.dataset_id))
    needed = smallest.cells / total + 5e-5
    remedy = f"`held_out_fraction={needed:.4f}`, or split" if needed < 1 else "split"
    return (
        f"no data set can be held out: {share}, and the smallest whose assays and tissues others "
        f"have too is {smallest.dataset_id} with {smallest.cells:,}. Remedy: {remedy} by cell "
        "(build_store.py without --split)."
    )
