"""The script for the day a GPU is at hand runs at a tiny size on a CPU, and says what fails."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import gpu_check
from gpu_check import Check, Failed


@pytest.mark.slow
def test_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "CHECKS", tuple(c for c in gpu_check.CHECKS if c is not Check.speed))
    out = tmp_path / "found.md"
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(out)])
    written = out.read_text()
    assert ended.value.code == 0, written
    assert "| training | 20 losses agree |" in written
    assert re.search(r"\| resuming \| 60 losses are equal to the last bit, after step [1-9]\d \|", written)
    assert "| sharding | losses differ by 0.0e+00;" in written
    assert "| tests | not run: no GPU |" in written
    assert "% of the time waiting for images, 0 workers |" in written
    assert "| fp32 | 0.0e+00 |" in written, "a CPU must have the losses of the CPU"


def test_a_check_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(check: Check) -> str:
        raise Failed("the device is too warm")

    def breaks(check: Check) -> str:
        raise RuntimeError("no kernel")

    def passes(check: Check) -> str:
        check.rows.append("| a row |")
        return "good"

    monkeypatch.setattr(gpu_check, "CHECKS", (refuses, breaks, passes))
    out = tmp_path / "found.md"
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(out)])
    assert ended.value.code == 1
    lines = [line.rpartition(" | ")[0] for line in out.read_text().splitlines()]
    assert "| refuses | failed: the device is too warm" in lines
    assert "| breaks | failed: RuntimeError('no kernel')" in lines
    assert "| passes | good" in lines
    assert out.read_text().endswith("| a row |\n")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(out), "--minutes", "0"])
    assert "| passes | failed: no time was left |" in out.read_text()


def test_losses_that_are_missing_or_not_finite_are_no_agreement() -> None:
    assert gpu_check.difference([1.0, 2.0], [1.0, 2.5]) == pytest.approx(0.2)
    assert gpu_check.difference([1.0, math.nan], [1.0, 1.0]) == math.inf
    with pytest.raises(ValueError, match="longer than"):
        gpu_check.difference([1.0], [1.0, 2.0])


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no-such-recipe: no such recipe"):
        gpu_check.run(["-m", "mpp", "pretrain", "no-such-recipe"], 60)
