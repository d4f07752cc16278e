"""The worked examples of docs/extending.md run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mpp.encoders.support import Family
from mpp.objective import contract
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- worked example: (.*?) -->\n```(?:python|text)\n(.*?)```", TEXT, re.DOTALL))


class Copy:
    """A copy of the project with the examples' files added, and nothing else."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder = folder
        for part in ("mpp", "tests", "recipes"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for file in files:
            (folder / file).write_text(EXAMPLES[file])

    def python(self, *words: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.mark.slow
def test_an_objective_is_one_file(shards: Path, tmp_path: Path) -> None:
    """The new target trains, and the contract tests find it."""
    copy = Copy(tmp_path, "mpp/objective/targets/luma.py")
    tests = ("tests/contracts/test_components.py", "tests/contracts/test_objectives.py")
    found = copy.python("pytest", *tests, "-k", "luma or declares")
    passed = re.search(r"(\d+) passed", found)
    assert passed
    assert int(passed[1]) >= 20, found
    assert "LumaTarget" in copy.python("mpp", "recipe", "schema", "pretrain")
    words = ("--preset", "tiny", "target=luma", "target.gain=2", f"data.shards={shards}", "out=run")
    copy.python("mpp", "pretrain", "recipes/pretrain/simmim_vit_b16.yaml", *words)


@pytest.mark.slow
def test_a_kind_of_label_is_one_file(tmp_path: Path) -> None:
    """The kind of label comes with a task that learns it: how bright an image is."""
    copy = Copy(tmp_path, "mpp/finetuning/labels/number.py", "mpp/finetuning/tasks/regress.py")
    for part, first in (("train", 0), ("val", 40)):
        rows = ["image,number"]
        for i in range(first, first + 40):
            level = (37 * i) % 200 + 20
            Image.new("RGB", (16, 16), (level, level, level)).save(tmp_path / f"{i}.png")
            rows.append(f"{i}.png,{level / 255:.4f}")
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    vit = "{name: vit_tiny_patch16_224, args: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}"
    recipe = f"""
job: finetune
out: ft
encoder: scratch
architecture: {vit}
task: regress
seeds: [0]
data: {{train: train.csv, val: val.csv, image_size: 16, workers: 0, crop_scale: [0.9, 1.0]}}
optim: {{steps: 60, base_lr: 0.02, global_batch_size: 20, warmup_steps: 5}}
"""
    (tmp_path / "regress.yaml").write_text(recipe)
    copy.python("mpp", "finetune", "regress.yaml")
    metrics = json.loads((tmp_path / "ft" / "scratch-seed0" / "result.json").read_text())["metrics"]
    assert metrics["r2"] > 0.5, metrics
    assert "verified" in copy.python("mpp", "verify", "ft/scratch-seed0")
    assert "SeveralClasses" not in copy.python("pytest", "tests/contracts/test_components.py", "-k", "declares")


def test_a_family_is_one_line() -> None:
    family = eval(EXAMPLES["a family"].strip().rstrip(","), {"Family": Family})
    row = contract.row(family)
    assert row["family"] == family.family
    assert row["ways"] == {"token": [], "pixel": []}
