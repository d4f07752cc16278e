"""The README's commands are run as they stand, on folders of small images; only sizes and lengths are cut down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.documented import commands, lay_out, lay_out_theirs, run_page

README = (ROOT / "README.md").read_text()


@pytest.mark.timeout(900)  # some thirty commands, each a process that imports torch
@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path: Path) -> None:
    lay_out(tmp_path)
    lay_out_theirs(tmp_path)
    ran = {re.findall(r"\b(?:mpp|python) (\S+)", line)[0] for line in run_page(README, tmp_path)}
    jobs = {"pretrain", "finetune", "evaluate", "predict", "inspect", "report", "watch", "plan"}
    others = {"pack", "export", "verify", "import", "reconstruct", "recipe", "models", "doctor", "tools/draw_shapes.py"}
    assert ran == jobs | others
    for made in ("reconstructions.png", "training.png", "runs/photos/report.html", "comparison.html"):
        assert (tmp_path / made).exists()


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands(README) if line.startswith("make ")]
    assert targets == ["demo", "test", "bench"]
    for target in targets:
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links(link: str) -> None:
    assert (ROOT / link).exists()
