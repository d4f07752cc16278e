"""Pages, docstrings, help texts and messages keep the rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.conftest import ROOT, tool

prose = tool("prose")


def test_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        prose.main([])
    assert not ended.value.code, capsys.readouterr().out


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page, source = tmp_path / "page.md", tmp_path / "source.py"
    page.write_text(
        "# A page where nothing wants to go on\n\n"
        "```sh\nmpp goes on\n```\n\n"
        "| it wants |\n\n"
        f"* A short one. This one is {'very ' * 35}long.\n"
        "* The run goes\n  on.\n"
    )
    source.write_text(
        '"""A run goes on."""\n'
        "# goes on, in a comment\n"
        'raise UserError(f"{key}: wants a folder")\n'
        'option("--x", help="Said, too.")\n'
        'text = "goes on, which nobody is shown"\n'
    )
    found = [*prose.find_faults(prose.page_texts(page)), *prose.find_faults(prose.source_texts(source))]
    assert [line.partition(": ")[0] for line in found] == [
        "page.md:9", "page.md:10", "source.py:1", "source.py:3", "source.py:4",
    ]  # fmt: skip
    assert "39 words" in found[0]


def test_sentences_of_the_readme_are_short() -> None:
    texts = prose.page_texts(ROOT / "README.md")
    words = [len(sentence.split()) for text in texts for sentence in prose.sentences(text.words)]
    assert len(words) > 50
    assert statistics.median(words) <= 14
