"""Links from the pages to lines of code: checked, or set again.

    python tests/doc_links.py [--check]

A link `[name](../geneformer_mcore/FILE.py#L12)`, its name between backticks, leads to the line that
defines that name (`Class.method` for a method) in that file.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGES = Path(__file__).resolve().parents[1] / "docs"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L(\d+)\)")


def main() -> int:
    """Set the line numbers; with --check change nothing, and exit with 1 if one is wrong."""
    wrong = 0
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        right = LINK.sub(lambda link, page=page: _right(link, page.parent), text)
        if right != text:
            wrong += 1
            print(
                f"{page.name}: lines of code have moved: python tests/doc_links.py sets them again"
            )
            if "--check" not in sys.argv:
                page.write_text(right)
    return 1 if wrong and "--check" in sys.argv else 0


def _right(link: re.Match[str], folder: Path) -> str:
    name, path, _ = link.groups()
    lines = dict(definitions(ast.parse((folder / path).read_text())))
    if name not in lines:
        raise SystemExit(f"error: {path} does not define {name}. Remedy: correct the link's name.")
    return f"[`{name}`]({path}#L{lines[name]})"


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(name, line) of every class, function, method and constant."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node.lineno
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (
                    (f"{prefix}{each.id}", node.lineno)
                    for each in ast.walk(target)
                    if isinstance(each, ast.Name)
                )


if __name__ == "__main__":
    sys.exit(main())
