"""Export an encoder in formats of other projects. Each export is reloaded in a clean process and compared.

A folder of any format holds the files of the format, `reference.safetensors` (images and the encoder's outputs for
them), `export.json` (format, checksums, tolerance, normalisation), `recipe.yaml` and a model card.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpp.encoders.checksums import has_head, sha256, weights_sha256
from mpp.encoders.folder import has_embedding
from mpp.encoders.resolve import stored_recipe, value_range_of
from mpp.encoders.sources import class_names, load_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, how_to_get, one_line
from mpp.exchange import card as modelcard
from mpp.exchange.artifact import Artifact
from mpp.exchange.verify import (
    Verified,
    check_files,
    found_in_clean_process,
    is_timm_export,
    tolerance_of,
    verified_at,
    verify_timm_folder,
    with_sections,
)
from mpp.finetuning.model import load_dense
from mpp.runs.environment import environment
from mpp.runs.records import check_beside, check_new, encoder_folder, write_json

FORMAT = 1
"""Version of export.json for formats other than timm's folder."""
COMPARE = """
import json
assert "mpp" not in sys.modules
differences = [0.0]
for found, rows in runs:
    for name, value in found.items():
        wanted = reference[name][rows]
        assert tuple(value.shape) == tuple(wanted.shape), f"{name}: {tuple(value.shape)}, wanted {tuple(wanted.shape)}"
        differences.append(float(abs(value - wanted).max()) / max(float(abs(wanted).max()), 1e-12))
print(json.dumps(dict(difference=float("nan") if any(d != d for d in differences) else max(differences))))
"""
"""Second part of the program that verifies an export. The first part, a format's `VERIFY`, defines `runs`: pairs of
outputs by name and the rows of `reference` that they must equal."""


def formats() -> list[str]:
    """Return the names of all formats, timm's folder first."""
    package = importlib.import_module("mpp.exchange.formats")
    return ["timm", *sorted(m.name for m in pkgutil.iter_modules(package.__path__))]


class _Outputs(nn.Module):
    """A model that returns the outputs of an encoder by name: features, embedding, logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: TimmModel = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.forward_features(images)
        outputs = {"features": features}
        if has_embedding(self.model):
            outputs["embedding"] = self.model.forward_head(features, pre_logits=True)
        if self.model.num_classes:
            outputs["logits"] = self.model.forward_head(features)
        return outputs


class _Places(nn.Module):
    """A model that returns the logits of every pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(images)}


def export(run: str | Path, out: str | Path, format: str) -> Verified:
    """Write the encoder of a run or an export, with its classifier or segmentation head, and verify it.

    Args:
        run: Folder of the run or export.
        out: The new folder.
        format: Name of the format. `mpp.exchange.verify.export_timm_folder` writes timm's folder instead.

    Raises:
        UserError: If `out` is not new or empty, a package that the format requires is missing, or the format does not
            support the encoder.
    """
    if format not in formats():
        raise UserError(f"--format: expected one of {', '.join(formats())}; got '{format}'")
    check_new(Path(out))
    card_sections = modelcard.sections(run)
    module = _module(format)
    artifact = _artifact(run, format)
    check_beside(Path(out), artifact.source)

    def make(folder: Path) -> None:
        folder.mkdir()
        try:
            kind = module.write(artifact, folder)
        except (UserError, OSError):
            raise
        except Exception as error:  # torch, onnx and transformers raise many kinds of errors for unsupported models
            family = type(artifact.timm).__name__
            raise UserError(f"--format {format}: {family}: {type(error).__name__}: {one_line(error)}") from error
        written = sorted(p.name for p in folder.iterdir())
        save_file({k: v.contiguous().clone() for k, v in artifact.reference.items()}, folder / "reference.safetensors")
        for name in written:
            shutil.copymode(artifact.source / "config.json", folder / name)
        if (artifact.source / "recipe.yaml").exists():
            shutil.copy(artifact.source / "recipe.yaml", folder)
        cfg = artifact.config["pretrained_cfg"]
        write_json(
            folder / "export.json",
            {
                "format": format,
                "format_version": FORMAT,
                "kind": kind,
                "files_sha256": {name: sha256(folder / name) for name in [*written, "reference.safetensors"]},
                "tolerance": artifact.tolerance,
                "parameters": sum(p.numel() for p in artifact.model.parameters()),
                "outputs": list(artifact.outputs),
                "classes": artifact.classes,
                "task": artifact.task,
                "normalisation": {key: cfg.get(key) for key in ("mean", "std", "input_size", "crop_pct")}
                | {"value_range": artifact.value_range},
                "environment": environment()["packages"],
            },
        )
        use = module.use(artifact, folder).strip().replace("FOLDER", Path(out).resolve().name)
        (folder / "README.md").write_text(_card(artifact, kind, use, card_sections), encoding="utf-8")

    return verified_at(Path(out), make, verify)


def verify(folder: str | Path) -> Verified:
    """Load an export in a clean process, as its users do, and compare its outputs.

    Raises:
        UserError: If the outputs or a file differ, or if the export cannot be loaded.
    """
    path = Path(folder)
    if is_timm_export(path):
        return verify_timm_folder(path)
    about = json.loads((path / "export.json").read_text())
    format = about["format"]
    try:
        known = about["format_version"] <= FORMAT and format in formats()
        tolerance, parameters, kind = float(about["tolerance"]), int(about["parameters"]), str(about["kind"])
        checksums = dict(about["files_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no readable export.json") from error
    if not known:
        raise UserError(f"{path}: of a newer release: format {format}, version {about['format_version']}")
    module = _module(format)
    check_files(path, checksums)
    if "reference.safetensors" not in checksums:
        raise UserError(f"{path}: no readable export.json")
    compared = found_in_clean_process(path, module.VERIFY + COMPARE, "cannot be loaded")
    difference = float(compared["difference"])
    if not difference <= tolerance:  # also true for nan
        raise UserError(f"{path}: outputs differ by {difference:.2e}, more than {tolerance:.0e}")
    return Verified(path, difference, parameters, through=f"{format} ({kind})")


def _module(format: str) -> Any:
    module = importlib.import_module(f"mpp.exchange.formats.{format}")
    missing = [name for name in module.NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format {format}: needs {', '.join(missing)}: {how_to_get(module.EXTRA)}")
    return module


def _artifact(run: str | Path, format: str) -> Artifact:
    source = encoder_folder(run)
    recipe_of = stored_recipe(source)
    tolerance = tolerance_of(source)
    weights_sha256(source)
    config = json.loads((source / "config.json").read_text())
    try:
        reference = load_file(source / "reference.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source}: no readable reference.safetensors: nothing to compare with") from error
    encoder: TimmModel = load_encoder(source).eval()
    classes = class_names(source) if encoder.num_classes else None
    if not has_head(source) or format == "safetensors":
        model: nn.Module = _Outputs(encoder)
    else:
        dense, recipe, classes = load_dense(source)
        if recipe.task.name != "segment" or format == "transformers":
            raise UserError(
                f"--format {format}: has no place for a head of task: {recipe.task.name}; use "
                + ("timm, safetensors, onnx, torch_export" if recipe.task.name == "segment" else "timm, safetensors")
            )
        model, encoder = _Places(dense), dense.encoder
        reference = {"images": reference["images"]}
    with torch.no_grad():
        outputs = model(reference["images"])
    reference = {"images": reference["images"], **{k: reference.get(k, v) for k, v in outputs.items()}}
    task = recipe_of.get("task", {}).get("name")
    value_range = value_range_of(recipe_of, config["pretrained_cfg"]["input_size"][0])
    return Artifact(
        source, encoder, model.eval(), tuple(outputs), config, classes, reference, tolerance, task, value_range
    )


def _card(artifact: Artifact, kind: str, use: str, sections: list[tuple[str, str]]) -> str:
    """Return the model card of the timm folder, with the usage example of another format."""
    try:
        card = (artifact.source / "README.md").read_text(encoding="utf-8")
    except OSError:
        card = ""
    library = "library_name: transformers\n" if "from transformers" in use else ""
    card = re.sub(r"(?ms)^library_name: timm\n", library, card)
    card = re.sub(r"(?ms)^## Use\n.*?(?=^## )", lambda _: f"## Use\n\n```python\n{use}\n```\n\n{kind}.\n\n", card)
    return with_sections(card, sections)
