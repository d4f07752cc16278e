"""The README's commands run on folders of small images, and print what the README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpp.runs.verdict import Verdict, table
from tests.conftest import ROOT
from tests.documented import assert_shown, lay_out, run_page, without_figures

README = (ROOT / "README.md").read_text()
SCORES = {"pretrained": (0.7, 0.71, 0.72), "scratch": (0.6, 0.61, 0.63), "cnn": (0.65, 0.66, 0.66)}


def conclusions() -> set[str]:
    """Return the lines of every conclusion over seeds. The test itself has one seed, which allows none."""
    lines: set[str] = set()
    for order in (("pretrained", "scratch", "cnn"), ("cnn", "scratch", "pretrained"), ("scratch", "cnn", "pretrained")):
        for shift in (0.0, 0.5):
            scores = dict(zip(order, SCORES.values(), strict=True))
            scores["cnn"] = tuple(score + shift * (i - 1) for i, score in enumerate(scores["cnn"]))
            scores["pretrained"] = tuple(score - shift * (i - 1) for i, score in enumerate(scores["pretrained"]))
            trials = {approach: [{"accuracy": score} for score in seeds] for approach, seeds in scores.items()}
            lines |= {without_figures(line) for line in table([Verdict.of(None, trials)]).splitlines()}
    return lines


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path: Path) -> None:
    lay_out(tmp_path)
    printed = run_page(README, tmp_path)
    ran = {re.findall(r"\bmpp (\S+)", line)[0] for line in printed}
    assert ran == {"doctor", "pretrain", "finetune", "predict", "report", "export"}
    assert (tmp_path / "runs/photos/report.html").exists()
    assert assert_shown(README, printed, also=conclusions()) == 3


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make (\w+)`", README))
    assert targets == {"demo", "docs", "test", "check"}
    for target in targets:
        assert f"\n{target}:" in makefile


def test_installation_comes_early() -> None:
    """A reader meets few words before the first command, without pictures and addresses."""
    above = README.partition("pip install .")[0]
    words = re.sub(r"!\[.*?\]\(.*?\)|\]\(.*?\)|```sh", " ", above).split()
    assert len(words) < 200


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http|#)[^)]+)\)", README))
def test_links(link: str) -> None:
    assert (ROOT / link).exists()
