"""Imports follow one order of packages, and third-party packages are imported only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mpp
from mpp.recipe.registry import KINDS, RECIPE_KEYS

PACKAGE = Path(mpp.__file__).parent
ORDER = [
    "errors", "rng", "recipe", "parallel", "drawing", "runs", "data", "encoders", "training", "objective", "evaluation",
    "embedding", "pretraining", "finetuning", "inspection", "reporting", "exchange", "planning", "cli",
]  # fmt: skip
"""Packages from the lowest to the highest. A file imports from its own package and from earlier ones."""
COMPONENTS_USE = {
    "mpp.data.batch", "mpp.data.labeled_sets", "mpp.encoders.cells", "mpp.encoders.maps", "mpp.encoders.teacher", "mpp.objective.interfaces", "mpp.objective.grid",
    "mpp.objective.colours", "mpp.objective.moving_teacher", "mpp.objective.weight_init", "mpp.finetuning.task", "mpp.finetuning.pyramid",
    "mpp.parallel.sharding", "mpp.recipe.flat", "mpp.recipe.values",
}  # fmt: skip
"""What a component may import: no other component, and nothing that depends on recipes or runs."""
ONLY_IN = {
    "webdataset": {"data"},
    "timm": {"encoders", "exchange", "training", "finetuning"},
    "accelerate": {"parallel", "runs", "training", "finetuning"},
    "click": {"cli"},
    "peft": {"finetuning"},
    "jinja2": {"reporting"},
    "matplotlib": {"drawing"},
    "pickle": set(),
}


def imported_by(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in PACKAGE.rglob("*.py") if package_of(p) not in ("__init__", "__main__")]


def test_every_file_is_in_the_order_and_in_the_wheel() -> None:
    assert {package_of(p) for p in FILES} == set(ORDER)
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(listed) == folders | {"mpp.recipes"}


def test_imports_point_down() -> None:
    level = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in imported_by(path)
        if name.startswith("mpp.") and name.split(".")[1] in level
        if level[name.split(".")[1]] > level[package_of(path)]
    ]
    assert not wrong


def test_components_import_no_other_component() -> None:
    for kind in (KINDS[key] for key in RECIPE_KEYS):
        for path in (PACKAGE / kind.folder).glob("*.py"):
            for name in imported_by(path):
                known = name.rpartition(".")[0] in COMPONENTS_USE
                assert known or not name.startswith("mpp."), f"{path}: a component imports {name}"


def test_packages_stay_where_they_belong() -> None:
    for path in FILES:
        for name in imported_by(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or package_of(path) in allowed, f"{path}: imports {name}"


@pytest.mark.parametrize(
    "code",
    [
        "import mpp",
        "import mpp.cli",
        "from mpp.cli import main; main(['recipe', 'list'])",
        "from mpp.cli import main; main(['recipe', 'show', 'pretrain/vit_small', 'data.shards=x', 'out=y'])",
        "from mpp.cli import main; main(['pretrain', 'pretrain/vit_small', 'mask.ratoi=1'])",
        "from mpp.cli import main; main(['finetune', 'finetune/vit_small', 'epochs=1'])",
        "from mpp.cli import main; main(['models'])",
        "from mpp.cli import main; main(['watch', '.'])",
        "from mpp.cli import main; main(['verify', '.'])",
        "from mpp.cli import main; main(['export', '.', 'out'])",
    ],
)
def test_light_commands_and_errors_in_recipes_import_no_torch(code: str, tmp_path: Path) -> None:
    watched = (
        f"import atexit, sys, os\natexit.register(lambda: os._exit(9) if 'torch' in sys.modules else None)\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", watched], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 9, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
