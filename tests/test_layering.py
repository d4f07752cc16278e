"""Imports point down only, and other people's packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import mpp

PACKAGE = Path(mpp.__file__).parent
LAYERS = [
    {"errors", "faults", "streams"},
    {"rng", "types", "verdict", "keymap", "records"},
    {"history", "verifying"},
    {"patches", "pyramid", "sharding", "weight_init"},
    {"masks", "corruptions", "targets", "losses", "heads", "tasks", "probes", "registry", "encoders", "layouts"},
    {"recipe", "data"},
    {
        "model", "contract", "optim", "checkpoint", "distributed", "metrics", "runfolder", "build", "exporting",
        "features", "liveness", "nonfinite", "unreadable",
    },
    {"diagnostics", "importing", "monitor", "distillation", "supervised", "lora", "formats"},
    {"predicting_dense", "symptoms", "modelcard"},
    {"converting"},
    {"pretraining", "finetuning", "evaluating", "predicting", "watching"},
    {"reporting", "replaying", "uploading", "planning", "doctor"},
    {"cli", "__init__", "__main__"},
]  # fmt: skip
COMPONENTS = {"masks", "corruptions", "targets", "losses", "heads", "tasks"}
WITHIN_LAYER = {
    "weight_init": {"patches"},
    "checkpoint": {"distributed"},
    "runfolder": {"checkpoint", "distributed"},
    "nonfinite": {"checkpoint", "distributed"},
    "contract": {"model"},
    "build": {"model", "contract", "exporting"},
    "exporting": {"metrics"},
    "recipe": {"data"},
    "unreadable": {"metrics"},
}
"""Layers are ordered; these few look sideways, and nothing looks back at them."""
ONLY_IN = {
    "webdataset": {"data"},
    "timm": {"encoders", "exporting", "importing", "optim", "finetuning", "distillation"},
    "accelerate": {"distributed", "pretraining", "finetuning"},
    "click": {"cli"},
    "peft": {"lora"},
    "jinja2": {"reporting"},
    "matplotlib": {"diagnostics"},
    "pickle": set(),
}


def imports_at_top_or_inside(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_has_a_layer() -> None:
    assert {part(p) for p in PACKAGE.rglob("*.py")} == set().union(*LAYERS)


def test_imports_point_down() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = part(path)
        for name in imports_at_top_or_inside(path):
            if not name.startswith("mpp.") or own in ("__init__", "__main__", "cli"):
                continue
            other = name.split(".")[1]
            if other == own and own not in COMPONENTS:
                continue
            if own in COMPONENTS:
                assert other in ("types", "patches", "pyramid", "sharding", "weight_init"), (
                    f"{path}: a component imports {name}"
                )
            else:
                lower = level[other] < level[own] or other in WITHIN_LAYER.get(own, ())
                assert lower, f"{path}: {own} imports {name}, which is not below it"


def test_packages_stay_where_they_belong() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in imports_at_top_or_inside(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or part(path) in allowed, f"{path}: imports {name}"


def test_import_of_mpp_is_light() -> None:
    """No torch before a command needs it."""
    import subprocess
    import sys

    code = "import sys, mpp, mpp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
