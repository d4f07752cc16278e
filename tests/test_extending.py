"""The worked examples of docs/extending.md run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from mpp.encoders.support import Family
from mpp.objective import contract
from tests.conftest import ROOT
from tests.documented import ENVIRONMENT, Workspace, run, run_page

TEXT = (ROOT / "docs" / "extending.md").read_text()
NEW_FILES = ("mpp/objective/targets/luma.py", "mpp/finetuning/labels/number.py", "mpp/finetuning/tasks/regress.py")
EXAMPLES = dict(re.findall(r"<!-- worked example: (.*?) -->\n```(?:python|text)\n(.*?)```", TEXT, re.DOTALL))


class Copy:
    """A copy of the package with the guide's files added, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "mpp", folder / "mpp", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        for file in NEW_FILES:
            (folder / file).write_text(EXAMPLES[file])
        (folder / "bin").mkdir()
        program = folder / "bin" / "mpp"  # of the copy, not of the installation
        program.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" -m mpp "$@"\n')
        program.chmod(0o755)
        self.env = {"PATH": f"{folder / 'bin'}:{ENVIRONMENT['PATH']}", "PYTHONPATH": str(folder)}

    def run(self, line: str) -> str:
        return run(line, self.folder, **self.env)


@pytest.fixture(scope="module")
def copy(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Follow the guide from top to bottom in a copy, which then has its components."""
    copy = Copy(workspace.copy(TEXT, tmp_path_factory.mktemp("copy")))
    assert run_page(TEXT, copy.folder, **copy.env)
    return copy


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_component_is_one_file(copy: Copy) -> None:
    """The contract tests find the new mask, target and kind of label. The target trains."""
    tests = "tests/contracts/test_components.py tests/contracts/test_objectives.py"
    found = copy.run(f"{sys.executable} -m pytest -p no:cacheprovider {tests} -k 'stripe or luma or declares'")
    passed = re.search(r"(\d+) passed", found)
    assert passed
    assert int(passed[1]) >= 22, found
    assert "SeveralClasses" not in found
    assert "LumaTarget" in copy.run("mpp recipe schema pretrain")
    words = "--preset tiny target=luma target.gain=2 data.shards=shards/photos out=runs/luma"
    copy.run(f"mpp pretrain recipes/pretrain/simmim_vit_b16.yaml {words}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kind_of_label_is_one_file(copy: Copy) -> None:
    """The kind of label comes with a task that learns it: how bright an image is."""
    for part, first in (("train", 0), ("val", 40)):
        rows = ["image,number"]
        for i in range(first, first + 40):
            level = (37 * i) % 200 + 20
            Image.new("RGB", (16, 16), (level, level, level)).save(copy.folder / f"{i}.png")
            rows.append(f"{i}.png,{level / 255:.4f}")
        (copy.folder / f"{part}.csv").write_text("\n".join(rows))
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
    (copy.folder / "regress.yaml").write_text(recipe)
    copy.run("mpp finetune regress.yaml")
    metrics = json.loads((copy.folder / "ft" / "scratch-seed0" / "result.json").read_text())["metrics"]
    assert metrics["r2"] > 0.5, metrics
    assert "verified" in copy.run("mpp verify ft/scratch-seed0")


def test_a_family_is_one_line() -> None:
    family = eval(EXAMPLES["a family"].strip().rstrip(","), {"Family": Family})
    row = contract.row(family)
    assert row["family"] == family.family
    assert row["ways"] == {"token": [], "pixel": []}
