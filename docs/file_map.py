"""Write the file tables of ``architecture.md`` from the first sentence of each module: ``python docs/file_map.py``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "architecture.md"
ROOT = PAGE.parents[1]
BEGIN, END = "<!-- files:begin -->\n", "<!-- files:end -->"
#: Heading -> (folder, whether its subfolders belong to it).
ROOMS = {
    "physisforcing/": ("physisforcing", False),
    "physisforcing/core/": ("physisforcing/core", True),
    "worldmodel/": ("worldmodel", True),
    "planner/": ("planner", True),
    "policy/": ("policy", True),
    "envs/": ("envs", True),
}


def first_sentence(path: Path) -> str:
    """The docstring up to its first full stop at a sentence's end, on one line, in Markdown's code marks."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    assert text, f"{path} has no docstring"
    sentence = re.split(r"(?<=[.?])\s(?=[A-Z`])", text)[0]
    return sentence.rstrip(".").replace("``", "`").replace("|", "\\|")


def tables() -> str:
    """All tables, a heading each."""
    out = []
    for heading, (folder, deep) in ROOMS.items():
        out += [f"**`{heading}`**\n", "| file | what it does |\n|---|---|"]
        for path in sorted((ROOT / folder).glob("**/*.py" if deep else "*.py")):
            if path.name.startswith("__") and path.stat().st_size < 600:
                continue
            name = path.relative_to(ROOT / folder).as_posix()
            out.append(f"| [`{name}`](../{path.relative_to(ROOT).as_posix()}) | {first_sentence(path)} |")
        out.append("")
    return "\n".join(out)


def written(page: str) -> str:
    """The page with its tables as they should be."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + tables() + "\n" + page[end:]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
