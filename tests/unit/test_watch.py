"""The lookout of one rank, when the store in which ranks meet answers no more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from geneformer_mcore.distributed import watchdog
from geneformer_mcore.distributed.watchdog import LostRankError, Watchdog


class Silenced:
    """A store that stops answering: as where the network loses all without a word, or with an error
    as where the connection is closed."""

    def __init__(self) -> None:
        self.closed, self.silent, self.over = (threading.Event() for _ in range(3))

    def check(self, _keys: list[str]) -> bool:
        if self.silent.is_set():
            self.over.wait(60)
        if self.closed.is_set():
            raise RuntimeError("Connection closed by peer")
        return False

    def set(self, *_: Any) -> None:
        self.check([])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silenced]:
    monkeypatch.setattr(watchdog, "PrefixStore", lambda _prefix, store: store)
    for name in ("_LOOK_S", "_STORE_S", "_JUDGED_S"):
        monkeypatch.setattr(watchdog, name, 0.1)
    made = Silenced()
    yield made
    made.over.set()


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_a_rank_that_stands_still_says_that_it_is_cut_off(store: Silenced, how: str) -> None:
    losses: list[LostRankError] = []
    ended = threading.Event()
    with Watchdog(0.3, lambda loss: (losses.append(loss), ended.set())) as lookout:
        lookout.join(store, 5, 8)
        lookout.doing("a step", step=3)
        getattr(store, how).set()
        assert ended.wait(20)
    (loss,) = losses
    assert str(loss).startswith("rank 5 of 8 is cut off from rank 0: the store on that node")
    assert "rank 5 at step 3, a step for " in str(loss)
    assert (loss.code, loss.tell, loss.step) == (1, True, 3)


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_an_error_of_lost_contact_is_explained_then_too(store: Silenced, how: str) -> None:
    def loses_contact() -> None:
        with Watchdog(60, pytest.fail) as lookout:
            lookout.join(store, 5, 8)
            getattr(store, how).set()
            raise RuntimeError("[gloo] Connection reset by peer")

    with pytest.raises(LostRankError, match=r"rank 5 of 8 is cut off .* Connection reset by peer"):
        loses_contact()


def test_a_process_of_its_own_is_cut_off_from_none() -> None:
    losses: list[str] = []
    ended = threading.Event()
    with Watchdog(0.1, lambda loss: (losses.append(str(loss)), ended.set())):
        assert ended.wait(20)
    assert losses[0].startswith("no rank got on for 0.1 s")
