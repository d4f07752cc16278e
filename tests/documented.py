"""Run what documents tell a reader to type. Only sizes, lengths and numbers of processes are reduced.

Fenced blocks of `sh`, `python` and `yaml` are used in their order. If the first line of a block is a comment with a
file name, the block is that file. A page lists what it requires as `<!-- workspace: … -->` (see `Workspace`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import ROOT, drawn_image, encoded
from tests.preloaded import run_command

SMALLER = {
    "mpp pretrain": [
        "encoder.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "data.image_size=32", "data.workers=0", "data.held_out=8",
        "optim.steps=3", "corruption.enter=1",
    ],
    "mpp plan": ["data.held_out=8"],
    "mpp inspect": ["--count=8"],
    "mpp evaluate": ["data.workers=0", "attentive.epochs=1", "linear.weight_decay=[0.1]"],
    "mpp finetune": ["data.image_size=32", "data.workers=0", "optim.steps=2", "seeds=[0]"],
}  # fmt: skip
AS_IT_IS = ("--preset", "mine.yaml")
"""Commands with one of these words run without reductions."""
OF_A_FOLDER = ("encoder.args", "corruption.enter")
"""Keys that are not overridden if the encoder is a folder with an architecture of its own."""
NOT_RUN = ("pip ", "make ")
"""Commands that a test cannot run on its machine. What they name is checked to exist."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, text) of the fenced blocks that are run or written, in their order."""
    return re.findall(r"^```(sh|python|yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Return the shell commands, without comments."""
    found = [
        line.split(" #")[0].strip()
        for language, block in blocks(text)
        if language == "sh"
        for line in block.splitlines()
    ]
    return [line for line in found if line and not line.startswith("#")]


def cut_down(line: str) -> str:
    """Return the same command, small, short and with at most two processes."""
    line = re.sub(r"(--nproc_per_node|--num_processes) \d+", r"\1 2", line)
    line = re.sub(r"\bdevices=\d+", "devices=2 device=cpu", line)
    if "small_images" in line.split("=")[0]:  # a ResNet: the arguments in SMALLER are for a ViT
        return f"{line} --preset tiny"
    job = re.search(r"mpp \w+", line)
    extra = SMALLER.get(job[0], []) if job and not any(mark in line for mark in AS_IT_IS) else []
    given = {word.split("=")[0].strip("'") for word in line.split()}
    if "encoder={name:" in line:
        given.update(OF_A_FOLDER)
    return " ".join([line, *(f"'{e}'" for e in extra if e.split("=")[0] not in given)])


def run(line: str, cwd: Path, allowed: tuple[int, ...] = (0,), **env: str) -> str:
    """Run a line of the shell and return what it prints.

    Args:
        line: Command as a page has it.
        cwd: Working directory.
        allowed: Exit codes that are accepted.
        **env: Additional environment variables.
    """
    if line.startswith("mpp ") and not env and not set(line) & set("|<>&;$*`"):
        done = run_command(shlex.split(line)[1:], cwd)
    else:
        done = subprocess.run(
            ["bash", "-c", line], cwd=cwd, env={**ENVIRONMENT, **env}, capture_output=True, text=True, check=False
        )
    said = done.stdout + done.stderr
    assert done.returncode in allowed, f"{line}\n{said}"
    return said


def run_python(code: str, cwd: Path, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**ENVIRONMENT, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def run_page(text: str, cwd: Path, **env: str) -> dict[str, str]:
    """Run everything on a page in its order.

    Args:
        text: Text of the page.
        cwd: Working directory.
        **env: Additional environment variables of the commands.

    Returns:
        What each command printed.
    """
    printed: dict[str, str] = {}
    for language, block in blocks(text):
        file = re.match(r"# (\S+\.\w+)\n", block)
        if language != "sh" and file:
            (cwd / file[1]).write_text(block)
        elif language == "python":
            run_python(block, cwd, **env)
        elif language == "sh":
            for line in commands(f"```sh\n{block}```"):
                if line.startswith(NOT_RUN):
                    continue
                # doctor may find faults of this machine, which are not ours
                printed[line] = run(cut_down(line), cwd, allowed=(0, 2) if line == "mpp doctor" else (0,), **env)
        else:
            raise AssertionError(f"a block of {language} that is no file:\n{block}")
    return printed


def shown_outputs(text: str) -> list[tuple[list[str], list[str]]]:
    """Return the commands of each `sh` block whose output a page shows, with the lines of the `text` block below it."""
    found = re.findall(r"^```sh\n([^`]*)^```\n+```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(commands(f"```sh\n{block}```"), shown.splitlines()) for block, shown in found]


def assert_shown(text: str, printed: dict[str, str], also: Collection[str] = ()) -> int:
    """Check that commands print what a page shows of their output, except for figures.

    Args:
        text: Text of the page.
        printed: Output by command.
        also: Other known lines, without figures.

    Returns:
        Number of blocks whose output the page shows.
    """
    shown = shown_outputs(text)
    for block, lines in shown:
        output = "\n".join(printed[command] for command in block if command in printed)
        known = {without_figures(line) for line in output.splitlines()} | {*also}
        missing = [line for line in lines if without_figures(line) not in known]
        assert missing == [], f"{block}\n{output}"
    return len(shown)


def without_figures(line: str) -> str:
    """Return a line of output without the parts that differ from run to run: figures, intervals, several seeds, a
    plural, the layer of a probe.
    """
    line = re.sub(r"[-+]?\d(?:[\d,.:e+-]*\d)?", "N", line)
    line = re.sub(r"N % +(layer N, \w+|out)\b", "N %", line)
    line = re.sub(r" ± N|N(, N)+|\(N % interval N to N\)", lambda found: "N" if found[0][0] == "N" else "", line)
    return " ".join(re.sub(r"\bN s\b", "N", line).replace("shards", "shard").split())


def lay_out(folder: Path) -> Path:
    """Create what every page may use: 40 images in photos/, labeled images, and the project's recipes and tools."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("recipes", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos" / "deeper").mkdir(parents=True)
    for i in range(40):
        name = f"deeper/{i}.png" if i % 4 == 0 else f"{i}.jpg"
        (folder / "photos" / name).write_bytes(encoded(drawn_image(i), "PNG" if i % 4 == 0 else "JPEG"))
        for part in ("train", "val"):
            labeled = folder / "labeled" / part / ("disc" if i % 2 == 0 else "square")
            labeled.mkdir(parents=True, exist_ok=True)
            (labeled / f"{i}.jpg").write_bytes(encoded(drawn_image(i + 100 * (part == "val")), "JPEG"))
    return folder


def lay_out_fields(folder: Path) -> None:
    """Write images of five bands with masks of two classes."""
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
        for i in range(6):
            rng = np.random.default_rng(i)
            np.save(folder / part / "images" / f"{i}.npy", rng.integers(0, 10_000, (5, 40, 40), dtype=np.uint16))
            mask = Image.fromarray(rng.integers(0, 2, (40, 40), dtype=np.uint8))
            mask.save(folder / part / "masks" / f"{i}.png")


def lay_out_theirs(folder: Path) -> None:
    """Write weights from elsewhere, whose names have a prefix."""
    theirs = timm.create_model("vit_small_patch16_224").state_dict()
    save_file({f"module.{name}": value for name, value in theirs.items()}, folder / "theirs.safetensors")


PRETRAIN = "mpp pretrain recipes/pretrain/vit_small.yaml data.shards=shards/photos out=runs/photos"


class Workspace:
    """Files that pages require, each made once and copied: photos and labeled always, the others by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = lay_out(folder)

    def _have(self, what: str) -> None:
        if what == "shards" and not (self.folder / "shards").exists():
            run("mpp pack photos shards/photos", self.folder)
        if what == "multichannel" and not (self.folder / "bands").exists():
            (self.folder / "bands").mkdir()
            for i in range(20):
                array = np.random.default_rng(i).integers(0, 10_000, (5, 24, 24), dtype=np.uint16)
                np.save(self.folder / "bands" / f"{i}.npy", array)
        if what == "fields" and not (self.folder / "fields").exists():
            lay_out_fields(self.folder / "fields")
        if what == "theirs" and not (self.folder / "theirs.safetensors").exists():
            lay_out_theirs(self.folder)
        if what == "runs/photos" and not (self.folder / what).exists():
            self._have("shards")
            run(cut_down(PRETRAIN), self.folder)

    def copy(self, text: str, to: Path) -> Path:
        """Copy what a page requires into a folder, and return the folder."""
        named = re.match(r"<!-- workspace: (.*) -->\n", text)
        wanted = named[1].split() if named else []
        known = {"shards", "labeled", "multichannel", "fields", "theirs", "runs/photos"}
        assert set(wanted) <= known, f"expected only {known}"
        for what in wanted:
            self._have(what)
        top = {what.split("/")[0] for what in wanted} | {"photos", "labeled"}
        names = {"multichannel": "bands", "theirs": "theirs.safetensors"}
        for name in top:
            source = self.folder / names.get(name, name)
            if source.is_dir():
                shutil.copytree(source, to / source.name)
            else:
                shutil.copy(source, to)
        for name in ("recipes", "tools"):
            (to / name).symlink_to(ROOT / name)
        return to
