"""What a user installs: the wheel in its own environment, outside the checkout; its time to answer; the image."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_IMPORT_S = 0.3
IN_ANOTHER_NAME = {
    "PIL": "pillow", "cycler": "matplotlib",
    "markupsafe": "jinja2", "yaml": "pyyaml", "sklearn": "scikit-learn", "skimage": "scikit-image", "braceexpand": "webdataset",
    "huggingface_hub": "timm", "pydantic_core": "pydantic", "fsspec": "torch",
}  # fmt: skip
"""Distribution that brings a module, if the names differ."""
COPIED = ("pyproject.toml", "README.md", "LICENSE", "mpp", "recipes")
"""What the image copies, which is enough to build the wheel."""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin/ of a new environment with the wheel, built from what the image copies.

    Dependencies are borrowed from this environment, because a second copy would take gigabytes. mpp itself is not
    borrowed, because its finder is a .pth file there.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(built, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "clean", symlinks=True)
    python = folder / "clean" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (folder / "clean" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def said(installed: Path, program: str, *words: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [installed / program, *words],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_works_away_from_the_checkout(installed: Path, image_folder: Path, tmp_path: Path) -> None:
    """The wheel's data files, entry points and imports work: a run, its report, its export."""
    where = said(installed, "python", "-c", "import mpp; print(mpp.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)
    assert said(installed, "mpp", "--version", cwd=tmp_path).strip().endswith(PROJECT["version"])
    assert json.loads(said(installed, "mpp", "recipe", "schema", "pretrain", cwd=tmp_path))["properties"]
    assert "pretrain/mae_vit_b16" in said(installed, "mpp", "recipe", "list", cwd=tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"job: pretrain\nout: run\ndata: {{shards: {image_folder}, image_size: 16, workers: 0, held_out: 8}}\n"
        "encoder: {name: vit_tiny_patch16_224, args: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}\n"
        "corruption: token\ntarget: norm_pixels\nhead: linear\noptim: {global_batch_size: 8, steps: 2}\n"
    )
    said(installed, "mpp", "pretrain", str(recipe), cwd=tmp_path)
    said(installed, "mpp", "export", "run", "encoder", cwd=tmp_path)
    said(installed, "mpp", "report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_everything_is_in_it(installed: Path) -> None:
    """The wheel has every module and data file of the package, and every recipe."""
    (site,) = (installed.parent / "lib").glob("python*/site-packages")

    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    recipes = {f"recipes/{name}" for name in files(ROOT / "recipes") if "/" in name}  # without measurements
    assert files(site / "mpp") == files(ROOT / "mpp") | recipes


@pytest.mark.slow
@pytest.mark.parametrize("words", [["python", "-c", "import mpp"], ["mpp", "--help"], ["mpp", "pretrain", "--help"]])
def test_it_answers_at_once(words: list[str], installed: Path, tmp_path: Path) -> None:
    """CPU time is measured, which other work does not lengthen. The shortest of five counts: the first one compiles."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said(installed, *words, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < MOST_IMPORT_S


@pytest.mark.parametrize("words", [[], ["--help"], ["pretrain", "--help"], ["completion", "bash"]])
def test_nothing_heavy_is_imported_before_it_is_needed(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, mpp, mpp.cli\n"
        f"try: {words} and mpp.cli.main({words})\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'timm', 'numpy', 'pydantic', 'accelerate'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def distribution(requirement: str) -> str:
    return Requirement(requirement).name.lower().replace("_", "-")


def test_every_import_is_of_a_dependency() -> None:
    """At the top of a module, an import needs a required dependency. Inside functions, an extra is enough."""
    always = {distribution(line) for line in PROJECT["dependencies"]}
    extras = {
        distribution(line)
        for name, lines in PROJECT["optional-dependencies"].items()
        if name not in ("dev", "test", "docs")
        for line in lines
    }
    for path in sorted((ROOT / "mpp").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top == "mpp":
                    continue
                brought = IN_ANOTHER_NAME.get(top, top).lower().replace("_", "-")
                assert brought in (always | extras if id(node) in inner else always), f"{path.name}: {name}"


def test_the_image_copies_what_the_wheel_is_built_from() -> None:
    """docker is not available to build the image, so its lines are read."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert set(copied) == set(COPIED)
    assert all((ROOT / name).exists() for name in copied)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied)
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(
        re.findall(r"FROM python:([\d.]+)", text)[0]
    )
