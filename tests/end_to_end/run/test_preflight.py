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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """Exit codes, what was printed, and {check: its line if it fails}."""

    codes: list[int | None]
    printed: str
    failing: dict[str, str]


def check(run: Run, kept: Path, *trouble: Any, more: Sequence[str] = (), ranks: int = 2) -> Found:
    """A preflight, which keeps its result as JSON."""
    nodes = (two_nodes, *trouble) if ranks > 1 else None
    given = (LIMIT, *more, f"--json={kept}")
    started = run.start(*given, ranks=ranks, trouble=nodes, command="preflight")
    codes = started.wait(60)
    checks = json.loads(kept.read_text())["checks"] if kept.exists() else []
    failing = {each["check"]: each["text"] for each in checks if each["state"] == "FAILS"}
    for name, text in failing.items():
        assert f"FAILS        {name}: {text}" in started.printed
    return Found(codes, started.printed, failing)


def test_all_is_well_and_nothing_is_left(run: Run, store: Path, tmp_path: Path) -> None:
    kept = tmp_path / "preflight.json"
    codes, printed, failing = check(run.at(tmp_path / "runs" / "a"), kept)
    assert (codes, failing) == ([0, 0], {}), printed
    assert os.listdir(tmp_path) == ["preflight.json"]
    table = printed.splitlines()[:3]
    assert [line.split()[0] for line in table] == ["node", "0", "1"]
    assert "2 node(s) see the same" in printed
    assert "all-reduce, data parallel: 1 group(s) of 2 ranks" in printed
    assert "all-reduce, tensor parallel: groups of one rank" in printed
    result = json.loads(kept.read_text())
    assert result["exit_code"] == 0
    assert result["seconds"] < 60
    assert [each["ranks"] for each in result["nodes"]] == [[0], [1]]
    assert result["nodes"][1]["seen"]["hash"] == Manifest.load(store).content_hash


def test_one_process_alone(run: Run, tmp_path: Path) -> None:
    codes, printed, failing = check(run, tmp_path / "preflight.json", ranks=1)
    assert (codes, failing) == ([0], {}), printed


OTHER_GPUS = {"gpus": ["A", "A"], "boot_id": "another", "driver": "1", "cuda": "2"}
ON_THE_GPUS = {"GPUs": "2 x A, driver 1, CUDA 2 on node 1", "network": r"127\.0\.0\.1"}
NO_FOLDER = "node 1 .*cannot write there: Not a directory"
SUMS = {"all-reduce, world": "ranks 0, 1", "all-reduce, data parallel": ""}


def of_a_setting(**failing: str) -> dict[str, str]:
    return {name.replace("_", " "): text for name, text in failing.items()} | {
        "versions": "settings"
    }


@pytest.mark.parametrize(
    ("trouble", "failing", "printed"),
    [
        (("setting", "data.store={}/no"), of_a_setting(cells="1 of 2 cannot use them: node 1"), ""),
        (("setting", "data.store={}/other"), of_a_setting(cells="ffffffffffff on node 1"), ""),
        (
            ("setting", "run.dir={}/empty"),
            of_a_setting(run_folder="node 1 .* did not see rank 0's file"),
            "",
        ),
        (("setting", "run.dir={}/file/run"), of_a_setting(run_folder=NO_FOLDER), ""),
        (("clock", 7.5), {"clocks": r"node 1 .*\+7\.[45]"}, ""),
        (("version", "numpy"), {"versions": r"numpy .*0\.0\.1 on node 1"}, ""),
        (("machine", OTHER_GPUS), ON_THE_GPUS, "all-reduce: GPUs, network must be mended first"),
        (("wrong sum",), SUMS, ""),
    ],
)
def test_a_node_that_differs(
    run: Run, store: Path, tmp_path: Path, trouble: tuple, failing: dict[str, str], printed: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shutil.copytree(store, tmp_path / "other")
    dataclasses.replace(Manifest.load(store), content_hash="f" * 64).save(tmp_path / "other")
    given = [each.format(tmp_path) if isinstance(each, str) else each for each in trouble]
    found = check(run, tmp_path / "preflight.json", *given)
    assert found.codes == [2, 2]
    assert found.failing.keys() == failing.keys(), "all that fails is listed"
    for name, text in failing.items():
        assert re.search(text, found.failing[name])
    assert printed in found.printed
    assert not run.folder.exists()
    assert list((tmp_path / "empty").iterdir()) == []


STUCK = (
    "rank 0 at step 0, the all-reduce of the world group (ranks 0, 1)",
    "rank 1 at step 0, building the process groups",
)
TENSOR = (
    "all-reduce, tensor parallel: 1 group(s) of 2 ranks",
    "all-reduce, data parallel: groups of one rank",
)
LOST = ("rank 1 of 2 is lost", "the all-reduce of the world group (ranks 0, 1)")


@pytest.mark.parametrize(
    ("trouble", "more", "codes", "texts"),
    [
        ("", "parallel.tensor=2", [0, 0], TENSOR),
        ("", "checkpoint.keep_last=1000000", [2, 2], ["room: .*up to 1000002 check.* missing"]),
        ("", "run.dir={}/file/run", [2, 2], ["FAILS +run folder: .*node 0"]),
        ("does not come", "parallel.timeout_s=4", [1, 1], STUCK),
        ("dies", LIMIT, [1, -signal.SIGKILL], LOST),
    ],
)
def test_a_layout_or_trouble_of_all(
    run: Run, tmp_path: Path, trouble: str, more: str, codes: list[int], texts: Sequence[str]
) -> None:
    (tmp_path / "file").touch()
    kept = tmp_path / "preflight.json"
    found = check(run, kept, trouble, more=[more.format(tmp_path)])
    assert found.codes == codes, found.printed
    for text in texts:
        assert text in found.printed or re.search(text, found.printed)
    assert "Traceback" not in found.printed
    assert not run.folder.exists()


def test_a_run_that_goes_on_is_reported_and_left_alone(run: Run, tmp_path: Path) -> None:
    run.folder.mkdir()
    with (run.folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = check(run, tmp_path / "preflight.json")
    assert found.codes == [2, 2]
    assert "another start of the run" in found.failing["run lock"]
    assert [path.name for path in run.folder.iterdir()] == [".lock"]
    assert check(run, tmp_path / "preflight.json").codes == [0, 0]


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
