"""The guides' commands and snippets run. The site is built with its notebooks, and all its links work."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from mpp.cli.app import main
from tests.conftest import ROOT
from tests.documented import (
    ENVIRONMENT,
    NOT_RUN,
    Workspace,
    assert_shown,
    blocks,
    commands,
    run_page,
    shown_outputs,
)

DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS) for p in DOCS.rglob("*.md"))
LAUNCHED = Path("many-gpus.md")  # tests/parallel/test_launch.py runs its commands
WITH_COMMANDS = [p for p in PAGES if commands((DOCS / p).read_text()) and p != LAUNCHED]


@pytest.mark.slow
@pytest.mark.timeout(600)  # a dozen commands, some in processes that import torch
@pytest.mark.parametrize("page", [p for p in WITH_COMMANDS if p.name != "extending.md"], ids=str)
def test_every_command_and_snippet(page: Path, workspace: Workspace, tmp_path: Path) -> None:
    text = (DOCS / page).read_text()
    printed = run_page(text, workspace.copy(text, tmp_path))
    assert printed
    assert_shown(text, printed)


def test_guides_run_every_command_and_show_some_output() -> None:
    ran = {
        word
        for page in PAGES
        for word in re.findall(r"^mpp (\w+)", "\n".join(commands((DOCS / page).read_text())), re.M)
    }
    hidden_or_not_here = {"upload", "replay", "completion", "index"}
    assert set(main.commands) - ran <= hidden_or_not_here
    shown = {page.name: len(shown_outputs((DOCS / page).read_text())) for page in PAGES}
    expected = {"start.md": 2, "images.md": 2, "exporting.md": 2, "finetuning.md": 1, "evaluating.md": 1}
    expected |= {"encoders.md": 1, "recipes.md": 1, "resuming.md": 1, "embedding.md": 1, "objectives.md": 1}
    assert {name: count for name, count in shown.items() if count} == expected


def test_what_is_not_run_exists() -> None:
    """Extras that pages ask pip for and targets of make exist."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    asked = 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / p for p in PAGES)]:
        text = page.read_text()
        for extra in re.findall(r"'\.\[([\w,]+)\]'", text):
            assert set(extra.split(",")) <= set(extras), page
            asked += 1
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert f"\n{target}:" in makefile, page
    assert asked > 5
    assert NOT_RUN == ("pip ", "make ")


def test_every_block_is_one_that_is_run_or_shown() -> None:
    """A block without a language, or in one that is not run, would be skipped silently."""
    shown = {"text", "{toctree}", "{literalinclude}", "{include}"}
    for page in PAGES:
        text = (DOCS / page).read_text()
        fences = re.findall(r"^```(\S*)", text, re.MULTILINE)[::2]
        assert set(fences) <= {"sh", "python", "yaml"} | shown, page
        for language, block in blocks(text):
            if language == "yaml":
                assert isinstance(yaml.safe_load(block), dict), page


def strings(source: str) -> list[str]:
    """Return the strings of a program without its docstrings, with … for inserted values."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [
        "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]
    return found + [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_messages_of_the_troubleshooting_page_are_said_somewhere() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^`([^`]+)`[^\n]*\n: ", page, re.MULTILINE)
    said = "\n".join(words for path in sorted((ROOT / "mpp").rglob("*.py")) for words in strings(path.read_text()))
    assert len(quoted) > 25
    missing = [words for words in quoted if words not in said]
    assert not missing


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids, self.links = set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src") and value and tag != "link":
                self.links.append(value)


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_with_their_outputs(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "each cell ran: jupyter execute --inplace"
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert {"stream", "display_data", "execute_result"} & {*kinds}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site(tmp_path: Path) -> None:
    """The site is built without a warning, its notebooks run, and none of its links is broken."""
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", DOCS, tmp_path / "site"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {}
    for path in (tmp_path / "site").rglob("*.html"):
        pages[path] = Links()
        pages[path].feed(path.read_text())
    assert len(pages) > 20
    broken = []
    for path, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken
    reference = (tmp_path / "site" / "reference" / "components.html").read_text()
    assert "inverse_block" in reference
    assert "max_aspect" in reference
