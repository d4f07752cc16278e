"""The README's commands are run as they stand, on folders of small images; only sizes and lengths are cut down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from tests.conftest import ROOT, drawn_image, encoded

README = (ROOT / "README.md").read_text()
SMALLER = {
    "mpp pretrain": [
        "encoder.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "data.image_size=32", "data.workers=0", "data.held_out=8",
        "optim.steps=3", "optim.epochs=null", "corruption.enter=1",
    ],
    "mpp plan": ["data.held_out=8"],
    "mpp inspect": ["--count=8"],
    "mpp evaluate": ["data.workers=0", "attentive.epochs=1", "linear.weight_decay=[0.1]"],
    "mpp finetune": ["data.image_size=32", "data.workers=0", "optim.steps=2", "optim.epochs=null", "seeds=[0]"],
}  # fmt: skip


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(900)  # some thirty commands, each a process that imports torch
@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path: Path) -> None:
    for folder in ("recipes", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for i in range(40):
        name = f"deeper/{i}.png" if i % 4 == 0 else f"{i}.jpg"
        (tmp_path / "photos" / name).write_bytes(encoded(drawn_image(i), "PNG" if i % 4 == 0 else "JPEG"))
        for part in ("train", "val"):
            folder = tmp_path / "labeled" / part / ("disc" if i % 2 == 0 else "square")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(encoded(drawn_image(i + 100 * (part == "val")), "JPEG"))
    theirs = timm.create_model("vit_small_patch16_224").state_dict()
    save_file({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "theirs.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = []
    for line in commands():
        if not line.startswith(("mpp ", "python ")):
            continue
        extra = [] if "--scale" in line else SMALLER.get(" ".join(line.split()[:2]), [])
        quoted = " ".join(f"'{e}'" for e in extra)
        done = subprocess.run(
            f"{line} {quoted}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        # what it says of this machine is not ours to judge
        allowed = (0, 2) if line == "mpp doctor" else (0,)
        assert done.returncode in allowed, f"{line}\n{done.stdout}\n{done.stderr}"
        ran.append(line.split()[1])
    jobs = {"pretrain", "finetune", "evaluate", "predict", "inspect", "report", "watch", "plan"}
    others = {"pack", "export", "verify", "import", "reconstruct", "recipe", "models", "doctor", "tools/draw_shapes.py"}
    assert set(ran) == jobs | others
    for made in ("reconstructions.png", "training.png", "runs/photos/report.html", "comparison.html"):
        assert (tmp_path / made).exists()
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet
    code = snippet[1] + "\nassert model.num_classes == 0"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets == ["demo", "test", "bench"]
    for target in targets:
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links(link: str) -> None:
    assert (ROOT / link).exists()
