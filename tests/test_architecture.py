"""The worked examples of ARCHITECTURE.md are executed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpp.encoders.support import Family
from mpp.objective import contract
from tests.conftest import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- worked example: (.*?) -->\n```(?:python|text)\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.slow
def test_an_objective_is_one_file(shards: Path, tmp_path: Path) -> None:
    """In a copy of the project: the file is added, nothing else; it trains and the contract tests find it."""
    for part in ("mpp", "tests", "recipes"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "mpp/objective/targets/luma.py").write_text(EXAMPLES["mpp/objective/targets/luma.py"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = python("pytest", "tests/contracts/test_components.py", "tests/contracts/test_objectives.py", "-k", "luma")
    passed = re.search(r"(\d+) passed", found)
    assert passed
    assert int(passed[1]) >= 20, found
    assert "LumaTarget" in python("mpp", "recipe", "schema", "pretrain")
    recipe = "recipes/pretrain/simmim_vit_b16.yaml"
    python(
        "mpp", "pretrain", recipe, "--scale", "tiny", "target=luma", "target.gain=2", f"data.shards={shards}", "out=run"
    )


def test_a_family_is_one_line() -> None:
    family = eval(EXAMPLES["a family"].strip().rstrip(","), {"Family": Family})
    row = contract.row(family)
    assert row["family"] == family.family
    assert row["ways"] == {"token": [], "pixel": []}
