"""A job on the tests' cluster, from its submission to its end.

submit  ->  at_step  ->  an event of the test's  ->  ended  ->  outcome, log, weights
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.forked import SETTINGS
from tests.soak.slurm.cluster import Cluster
from tests.support.final_state import FinalState, final_state

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "slurm/pretrain_106m.sh"
CONFIGURATION = "configs/geneformer_106m.yaml"
"""Of the run that the script starts."""
TOY = (
    *SETTINGS,
    "train.steps=120",
    "train.validate_every_steps=0",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=40",
    "parallel.timeout_s=60",
)
"""The small model of the other tests and a short run; dropout stays on."""
SLOW = ("train.validate_every_steps=1", "train.validate_batches=8")
"""A step takes longer, and no weight changes by it."""
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass(frozen=True)
class Job:
    """A job, its run folder and its log."""

    cluster: Cluster
    number: str
    run: Path
    log_file: Path

    def at_step(self, step: int, restarts: int = 0) -> None:
        """Waits until that step is logged, by the start after so many restarts."""

        def is_there() -> bool:
            if self.log.count("restart ") >= restarts and self._last_step() >= step:
                return True
            assert self.state() not in _ENDS, self.log
            return False

        self.wait_until(is_there)

    def ended(self) -> str:
        """The state in which it ended."""
        self.wait_until(lambda: self.state() in _ENDS)
        return self.state()

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 600) -> None:
        """Fails with the job's log if it does not come to hold."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"{self.state()} after {timeout_s} s:\n{self.log}"
            time.sleep(0.2)

    def state(self) -> str:
        """As SLURM has it now."""
        return self.shown("JobState")

    def shown(self, key: str) -> str:
        """A value of `scontrol show job`."""
        text = self.cluster.run("scontrol", "show", "job", self.number)
        (value,) = re.findall(rf"\b{key}=(\S*)", text)
        return str(value)

    @property
    def restarts(self) -> int:
        """How often SLURM has started it again."""
        return int(self.shown("Restarts"))

    @property
    def log(self) -> str:
        """The output of all of its starts."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def lines(self) -> list[str]:
        """Lines that the job's script has logged, without their time."""
        found = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)$", self.log, re.MULTILINE)
        return [str(line) for line in found]

    def outcome(self) -> dict:
        """outcome.json of its run."""
        return json.loads((self.run / "outcome.json").read_text())

    def weights(self) -> FinalState:
        """Digests of the final weights, moments and random states."""
        return final_state(self.run)

    def _last_step(self) -> int:
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def submit(
    cluster: Cluster,
    run: Path,
    store: Path,
    *settings: str,
    options: tuple[str, ...] = (),
    script: str = SCRIPT,
    nodes: int = 2,
    preflight: bool = False,
) -> Job:
    """The script of the project as it is, with one rank per node, on a small model.

    options: of sbatch, before the script
    """
    log = run.with_name(f"{run.name}.log")
    number = cluster.run(
        "env",
        f"GENEFORMER_PREFLIGHT={'yes' if preflight else 'no'}",
        "sbatch",
        "--parsable",
        f"--nodes={nodes}",
        "--gpus-per-node=1",
        f"--output={log}",
        *options,
        script,
        f"data.store={store}",
        f"run.dir={run}",
        *TOY,
        *settings,
        cwd=ROOT,
    )
    return Job(cluster, number.strip(), run, log)
