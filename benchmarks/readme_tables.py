"""Fill the tables of README.md and docs/*.md from the measurements in benchmarks/results.

    python benchmarks/readme_tables.py            rewrites them
    python benchmarks/readme_tables.py --check    changes nothing; exit code 1 and a diff

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. No number gets in by hand:
harness/pages.py has a function per table.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import difflib
import re

from benchmarks.harness.common import RESULTS, ROOT
from benchmarks.harness.pages import TABLES
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    parser.add_argument("--check", action="store_true", help="fail if a page would change")
    parser.add_argument("--readme", type=Path, nargs="+", default=pages, metavar="PAGE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    status = 0
    for page in arguments.readme:
        before = page.read_text()
        after = filled(before, arguments.results)
        if not arguments.check:
            page.write_text(after)
        elif before != after:
            names = (page.name, f"{page.name} as measured")
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names)
            print(*lines, "run: python benchmarks/readme_tables.py", sep="\n", file=sys.stderr)
            status = 1
    return status


def filled(page: str, results: Path) -> str:
    """`page` with every table rebuilt. Raises DataError for a name without a function."""

    def table(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise DataError(f"no table is called {name}; there are {', '.join(TABLES)}.")
        return f"{opening}{TABLES[name](results)}\n{closing}"

    return BLOCK.sub(table, page)


if __name__ == "__main__":
    run(main)
