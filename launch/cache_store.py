"""Copy a run's store to this node's own disk before the run, so that no rank waits for another.

python launch/cache_store.py [--config FILE] [section.key=value ...]

Takes the arguments of launch/pretrain.py; the copy is made in data.cache_dir, where it is not there
yet. A run makes it by itself, too: on several nodes, the slowest disk must then be done within
parallel.timeout_s of the fastest. Exits with status 0; 2 if the store or the settings are wrong, or
the disk is full.
"""

from __future__ import annotations

import time
from pathlib import Path

from geneformer_mcore import config as settings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import FINISHED, run
from geneformer_mcore.inference import options

EXAMPLE = """example: srun --ntasks-per-node=1 python launch/cache_store.py \\
    --config configs/geneformer_10m.yaml data.store=stores/census data.cache_dir=/local/tokens"""


def main() -> int:
    """Open the cells as a run does."""
    parser = options.parser(__doc__, EXAMPLE)
    parser.add_argument("--config", type=Path, help="YAML file, as for launch/pretrain.py")
    options.add(parser, "settings")
    arguments = parser.parse_intermixed_args()
    config, _ = settings.load(arguments.config, arguments.settings)
    if not config.data.cache_dir:
        raise ConfigError("data.cache_dir names no folder: give it one on this node's own disk.")
    from geneformer_mcore.training import datasets

    started = time.monotonic()
    cells = datasets.open_cells(config)
    print(f"{cells.name}: in {config.data.cache_dir}, {time.monotonic() - started:.1f} s")
    return FINISHED


if __name__ == "__main__":
    run(main)
