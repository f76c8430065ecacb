"""Doing again what a network spoiled, a few times, and then no more.

work  ->  fails as networks do?  ->  wait 2, 4, 8, ... s  ->  work again  ->  its result
                                                          ->  NetworkError, after the last time
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from geneformer_mcore.cells.outside import is_network_fault
from geneformer_mcore.errors import DataError, NetworkError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Retry:
    """attempts: how often at most; wait_s: before the second, twice as long before each further."""

    attempts: int = 6
    wait_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise DataError(f"--attempts must be 1 or more, not {self.attempts}.")

    def call(self, what: str, work: Callable[[], Result]) -> Result:
        """What `work` returns; `what` names it in messages, one of which goes to stderr per retry.

        Raises NetworkError after the last attempt, and at once whatever is no fault of a network.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return work()
            except (OSError, RuntimeError, DataError) as error:
                if not is_network_fault(error):
                    raise
                if attempt == self.attempts:
                    message = f"{what}: failed {attempt} times, last with: {_reason(error)}"
                    raise NetworkError(message) from error
                self._wait(what, attempt, error)
        raise AssertionError("there is at least one attempt")

    def _wait(self, what: str, attempt: int, error: Exception) -> None:
        # Somewhat at random: tasks of an array that failed together shall not come back together.
        seconds = self.wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        again = f"Again in {seconds:.0f} s ({attempt} of {self.attempts} attempts made)."
        print(f"warning: {what}: {_reason(error)}. {again}", file=sys.stderr, flush=True)
        time.sleep(seconds)


def _reason(error: Exception) -> str:
    # Its remedy is for what the user can mend.
    return str(error).split("\n")[0].split(" Remedy:")[0].rstrip(".")
