"""Settings of a run: dataclasses, loading, and the plan that checks them together (floor 2)."""

from geneformer_mcore.config.derive import Plan, plan
from geneformer_mcore.config.load import argument, dump, from_anywhere, load, parse, run_dir
from geneformer_mcore.config.sections import Config

__all__ = [
    "Config",
    "Plan",
    "argument",
    "dump",
    "from_anywhere",
    "load",
    "parse",
    "plan",
    "run_dir",
]
