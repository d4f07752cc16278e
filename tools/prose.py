"""Check how the project writes: sentence length and a list of habits, in pages, docstrings, help texts and messages.

    python tools/prose.py [FILE]...

Each finding is printed as a line, `file:line: what: sentence`. The exit code is 1 if there are any. The rules are in
CONTRIBUTING.md. Tables, code and headings are left out.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_WORDS = 35
HABITS = {
    r"\banew\b": "again",
    r"\b(goes|went|going|go) on\b": "continue, resume",
    r"\bwants?\b(?! to)": "requires, needs",
    r"\bis said\b|\bare said\b": "is printed, is reported",
    r"\bblotted\b": "removed",
    r"\bbeside the same\b": "compared with",
    r", too[.;:]": "also, before the verb",
    r"\bnone of (its|their) own\b": "no … of its own",
    r"\b(lies|lie|stands|stand) (in|on|at|beside)\b": "is, are",
    r"\bas it stands\b|\bas they stand\b": "unchanged",
    r"\bno longer than so\b": "at most",
    r"\ballowed (are|is)\b|\ballowed( here| with \w+)?: ": "expected …, use …",
}
"""Expressions that make readers stumble, and what to write instead."""
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/reference/*.md",
    "docs/notebooks/*.ipynb",
)
NOT_CHECKED = ("docs/log.md", "docs/architecture.md", "docs/changelog.md")
"""Pages that only include another file. The older parts of recipes/LOG.md are a record, and are not rewritten."""
MESSAGES = (
    "UserError",
    "BadImage",
    "ValueError",
    "MppWarning",
    "warn",
    "Broken",
    "Finding",
    "Symptom",
    "View",
    "Conclusion",
    "echo",
    "print",
    "say",
)
"""Functions whose arguments are shown to users."""


class Text(NamedTuple):
    """A paragraph, and the line where it begins."""

    path: Path
    line: int
    words: str


def page_texts(path: Path) -> Iterator[Text]:
    """Yield the paragraphs and list items of a Markdown page, or of a notebook with the lines of its file."""
    kept: list[str] = []
    began, fenced = 0, False
    for number, line in enumerate([*_page_lines(path), ""], 1):
        if line.startswith("```"):
            fenced = not fenced
        item = re.match(r"\s*([*-]|\d+\.|:) ", line)
        drawn = line.startswith("    ") and not kept  # code or a drawing, not the next line of a list item
        skipped = fenced or drawn or line.startswith(("```", "|", "#", "<", "![", ">"))
        if (not line.strip() or item or skipped) and kept:
            yield Text(path, began, " ".join(kept))
            kept = []
        if line.strip() and not skipped:
            began = began if kept else number
            kept.append(line[item.end() :] if item else line.strip())


def _page_lines(path: Path) -> list[str]:
    """Return the lines of a page. For a notebook, return the lines of its file, empty unless they are Markdown."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".ipynb":
        return lines
    shown, markdown = [], False
    for line in lines:
        if found := re.match(r'\s*"cell_type": "(\w+)"', line):
            markdown = found[1] == "markdown"
        text = re.match(r'    "(.*?)(\\n)?",?$', line) if markdown else None
        shown.append(text[1] if text else "")
    return shown


def source_texts(path: Path) -> Iterator[Text]:
    """Yield docstrings, texts below attributes, and messages of a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts: dict[int, tuple[int, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts[id(node.value)] = (node.lineno, node.value.value)
        elif isinstance(node, ast.Call) and _name(node.func) in MESSAGES:
            for argument in node.args:
                texts[id(argument)] = (node.lineno, _written(argument))
        elif isinstance(node, ast.keyword) and node.arg == "help":
            texts[id(node.value)] = (node.value.lineno, _written(node.value))
    for line, text in texts.values():
        for paragraph in re.split(r"\n\s*\n|\n(?=\s+\w+: )|\x08", text):
            if not re.search(r"\S {3,}\S|^    +\S.*\n {8}", paragraph):  # a drawing or a table
                yield Text(path, line, " ".join(paragraph.split()))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _written(node: ast.expr) -> str:
    """Return the text of a literal, with … for inserted values, and the texts that an expression joins or chooses."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _written(node.left) + _written(node.right)
    if isinstance(node, ast.IfExp):  # check both texts of `a if … else b`
        return f"{_written(node.body)}\n\n{_written(node.orelse)}"
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph, without code, addresses and parentheses."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    text = re.sub(r"\b(e\.g|i\.e|et al|vs|cf)\.", r"\1", re.sub(r"\([^()]*\)", "", text))
    return [found.strip() for found in re.split(r"(?<=[.!?:])\s+(?=[\w`*…])", text) if found.strip()]


def find_faults(texts: Iterator[Text]) -> Iterator[str]:
    """Yield a line for each sentence that is too long or has one of the habits."""
    for path, line, words in texts:
        place = f"{path.relative_to(ROOT)}:{line}"
        for sentence in sentences(words):
            if len(sentence.split()) > MOST_WORDS:
                yield f"{place}: {len(sentence.split())} words: {sentence}"
            for habit, instead in HABITS.items():
                if re.search(habit, sentence):
                    yield f"{place}: write {instead!r}: {sentence}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check how pages, docstrings, help texts and messages are written.")
    parser.add_argument("files", type=Path, nargs="*", help="default: all pages, and all of mpp/")
    given = [path.resolve() for path in parser.parse_args(words).files]
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    everything = [p for p in pages if str(p.relative_to(ROOT)) not in NOT_CHECKED] + sorted(
        (ROOT / "mpp").rglob("*.py")
    )
    faults = [
        fault
        for path in given or everything
        for fault in find_faults(source_texts(path) if path.suffix == ".py" else page_texts(path))
    ]
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
