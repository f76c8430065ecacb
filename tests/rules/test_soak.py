"""What the soak makes of the processes that it starts."""

from __future__ import annotations

import pytest

from tests.soak.__main__ import judged

SKIPPED = "sss\nSKIPPED [2] tests/soak/slurm/conftest.py:23: no slurmctld\n2 skipped in 0.1s\n"


@pytest.mark.parametrize(
    ("printed", "code", "least", "repetitions", "failures", "skipped"),
    [
        ("25 kills, by phase", 0, 1, 25, 0, ""),
        ("25 kills, by phase", 1, 1, 25, 1, ""),
        ("25 kills, by phase", None, 1, 25, 1, ""),
        ("", 0, 1, 0, 1, ""),
        ("", 0, 0, 0, 0, ""),
        ("4 deselected in 0.1s", 5, 1, 0, 1, ""),
        ("247 calls, 0 of them tried; afterwards: {}", 0, 1, 0, 1, ""),
        (SKIPPED, 0, 1, 0, 0, "no slurmctld"),
        (SKIPPED, 1, 1, 0, 1, ""),
        ("caught: 3\nmissed: 2\n", 1, 1, 5, 2, ""),
    ],
)
def test_a_share_that_has_done_nothing_has_failed_unless_it_was_skipped(
    printed: str, code: int | None, least: int, repetitions: int, failures: int, skipped: str
) -> None:
    expected = {"repetitions": repetitions, "failures": failures, "skipped": skipped}
    assert judged(printed, code, least)[0] == expected
