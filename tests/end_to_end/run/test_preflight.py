"""launch/preflight.py on two ranks, each of them a "node": a clean pass, and each way to fail."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from geneformer_mcore.distributed.network import interface_of
from geneformer_mcore.store.layout import Manifest
from tests.end_to_end.forked import Run
from tests.support import commands

LIMIT = "parallel.timeout_s=20"


def wrong_sum(whole: Any) -> Any:
    def all_reduce(values: Any, **more: Any) -> None:
        whole(values, **more)
        values[-1] += 1

    return all_reduce


REDUCING = "geneformer_mcore.preflight.cluster:reduce_in"
TROUBLES: dict[str, tuple[str, Callable[..., Any]]] = {
    "setting": (
        "geneformer_mcore.config:load",
        lambda whole, setting: lambda file, overrides: whole(file, [*overrides, setting]),
    ),
    "clock": (
        "geneformer_mcore.preflight.cluster:now",
        lambda whole, seconds: lambda: whole() + seconds,
    ),
    "version": (
        "geneformer_mcore.backends:describe",
        lambda whole, name: lambda: whole() | {name: "0.0.1"},
    ),
    "machine": (
        "geneformer_mcore.preflight.node:look",
        lambda whole, values: lambda text: dataclasses.replace(whole(text), **values),
    ),
    "does not come": (REDUCING, lambda _: lambda *_: time.sleep(600)),
    "dies": (REDUCING, lambda _: lambda *_: os.kill(os.getpid(), signal.SIGKILL)),
    "wrong sum": ("torch.distributed:all_reduce", wrong_sum),
}
"""Name of what is replaced, and by what: a function of the original."""


def two_nodes(rank: int, what: str = "", *args: Any) -> None:
    """Trouble: each rank is a node of its own, and rank 1 has `what`, of TROUBLES."""
    from geneformer_mcore.preflight import checks

    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    checks.SEE_S = 0.6
    if what and rank == 1:
        place, change = TROUBLES[what]
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        setattr(owner, name, change(getattr(owner, name), *args))


def in_the_network(_: int, own_address: str) -> None:
    """Trouble: the two nodes meet at the machine's address in its network."""
    os.environ.update(MASTER_ADDR=own_address, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")


@dataclass
class Preflight:
    """Preflights of a run on two ranks, and what the last one has found."""

    run: Run
    json: Path
    codes: list[int | None] = field(default_factory=list)
    printed: str = ""
    failing: dict[str, str] = field(default_factory=dict)
    """{check: its line}"""

    def check(self, *trouble: Any, more: tuple[str, ...] = (), ranks: int = 2) -> None:
        nodes = (two_nodes, *trouble) if ranks > 1 else None
        given = (LIMIT, *more, f"--json={self.json}")
        started = self.run.start(*given, ranks=ranks, trouble=nodes, command="preflight")
        self.codes, self.printed = started.wait(60), started.printed
        checks = json.loads(self.json.read_text())["checks"] if self.json.exists() else []
        self.failing = {each["check"]: each["text"] for each in checks if each["state"] == "FAILS"}
        for check, text in self.failing.items():
            assert f"FAILS        {check}: {text}" in self.printed


@pytest.fixture
def preflight(run: Run, tmp_path: Path) -> Preflight:
    return Preflight(run, tmp_path / "preflight.json")


def test_all_is_well_and_nothing_is_left(preflight: Preflight, store: Path, tmp_path: Path) -> None:
    preflight.run = preflight.run.at(tmp_path / "runs" / "a")
    preflight.check()
    printed = preflight.printed
    assert (preflight.codes, preflight.failing) == ([0, 0], {}), printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["preflight.json"]
    table = printed.splitlines()[:3]
    assert [line.split()[0] for line in table] == ["node", "0", "1"]
    assert "2 node(s) see the same" in printed
    assert "all-reduce, data parallel: 1 group(s) of 2 ranks" in printed
    assert "all-reduce, tensor parallel: groups of one rank" in printed
    kept = json.loads(preflight.json.read_text())
    assert kept["exit_code"] == 0
    assert kept["seconds"] < 60
    assert [each["ranks"] for each in kept["nodes"]] == [[0], [1]]
    assert kept["nodes"][1]["seen"]["hash"] == Manifest.load(store).content_hash


def test_one_process_alone(preflight: Preflight) -> None:
    preflight.check(ranks=1)
    assert (preflight.codes, preflight.failing) == ([0], {}), preflight.printed


def test_tensor_groups_are_those_of_the_layout(preflight: Preflight) -> None:
    preflight.check(more=("parallel.tensor=2",))
    assert preflight.codes == [0, 0], preflight.printed
    assert "all-reduce, tensor parallel: 1 group(s) of 2 ranks" in preflight.printed
    assert "all-reduce, data parallel: groups of one rank" in preflight.printed


OTHER_GPUS = {"gpus": ["A", "A"], "boot_id": "another", "driver": "1", "cuda": "2"}


@pytest.mark.parametrize(
    ("trouble", "name", "text"),
    [
        (("setting", "data.store={}/no"), "cells", "1 of 2 cannot use them: node 1"),
        (("setting", "data.store={}/other"), "cells", "ffffffffffff on node 1"),
        (("setting", "run.dir={}/empty"), "run folder", "node 1 .* did not see rank 0's file"),
        (("setting", "run.dir={}/file/run"), "run folder", "node 1 .*write there: Not a directory"),
        (("clock", 7.5), "clocks", r"node 1 .*\+7\.[45]"),
        (("version", "numpy"), "versions", r"numpy .*0\.0\.1 on node 1"),
        (("machine", OTHER_GPUS), "GPUs", "2 x A, driver 1, CUDA 2 on node 1"),
        (("wrong sum",), "all-reduce, world", "ranks 0, 1"),
    ],
)
def test_a_node_that_differs(
    preflight: Preflight, store: Path, tmp_path: Path, trouble: tuple, name: str, text: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shutil.copytree(store, tmp_path / "other")
    dataclasses.replace(Manifest.load(store), content_hash="f" * 64).save(tmp_path / "other")
    given = [each.format(tmp_path) if isinstance(each, str) else each for each in trouble]
    preflight.check(*given)
    failing = preflight.failing
    assert preflight.codes == [2, 2]
    assert re.search(text, failing[name])
    more = {"setting": "versions", "machine": "network", "wrong sum": "all-reduce, data parallel"}
    assert set(failing) == {name, more.get(given[0], name)}, "all that fails is listed"
    if given[0] == "setting":
        assert "settings" in failing["versions"]
    if given[0] == "machine":
        assert "127.0.0.1" in failing["network"]
        assert "not checked  all-reduce: GPUs, network must be mended first" in preflight.printed
    assert not preflight.run.folder.exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_that_cannot_be_written_by_rank_0(preflight: Preflight, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    preflight.run = preflight.run.at(tmp_path / "file" / "run")
    preflight.check()
    assert preflight.codes == [2, 2], preflight.printed
    assert "node 0" in preflight.failing["run folder"]


def test_a_run_that_goes_on_is_reported_and_left_alone(preflight: Preflight) -> None:
    folder = preflight.run.folder
    folder.mkdir()
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        preflight.check()
    assert preflight.codes == [2, 2]
    assert "another start of the run" in preflight.failing["run lock"]
    assert [path.name for path in folder.iterdir()] == [".lock"]
    preflight.check()
    assert preflight.codes == [0, 0]


def test_no_room_for_the_checkpoints(preflight: Preflight) -> None:
    preflight.check(more=("checkpoint.keep_last=1000000",))
    assert preflight.codes == [2, 2], preflight.printed
    assert re.search("up to 1000002 checkpoints .*missing", preflight.failing["room"])


def test_nodes_talk_over_the_interface_that_leads_to_the_master(run: Run) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    printed = run.check(ranks=2, trouble=(in_the_network, own), command="preflight")
    name = interface_of(own)
    assert name != "lo"
    assert f"on one machine, over {name}" in printed
    assert f"  {name} {own}  " in printed


def test_a_rank_that_does_not_come_is_named(preflight: Preflight) -> None:
    preflight.check("does not come", more=("parallel.timeout_s=4",))
    assert preflight.codes == [1, 1]
    printed = preflight.printed
    assert "rank 0 at step 0, the all-reduce of the world group (ranks 0, 1)" in printed
    assert "rank 1 at step 0, building the process groups" in printed
    assert "Traceback" not in printed
    assert not preflight.run.folder.exists()


def test_a_rank_that_dies_is_named(preflight: Preflight) -> None:
    preflight.check("dies")
    assert preflight.codes == [1, -signal.SIGKILL]
    assert "rank 1 of 2 is lost" in preflight.printed
    assert "the all-reduce of the world group (ranks 0, 1)" in preflight.printed


@pytest.mark.parametrize("given", ["optim.lr=-1", "no.such=1"])
def test_a_wrong_setting_is_answered_as_by_pretrain(given: str) -> None:
    ended = commands.run("launch/preflight.py", given)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.soak
def test_through_torchrun(run: Run) -> None:
    words = ("--rdzv-backend=loopback", "--nproc_per_node=2", "launch/preflight.py")
    ended = commands.torchrun(*words, *run.words())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 of 12 checks fail" in ended.stdout
    assert " 0-1 " in ended.stdout.splitlines()[1]
    assert not run.folder.exists()
