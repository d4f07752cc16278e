"""Copy an encoder, load the copy with plain timm in a clean process, and compare its outputs.

This process does not import torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from mpp.encoders.checksums import check_head, has_head, sha256, weights_sha256
from mpp.errors import UserError, reason
from mpp.recipe.flat import JsonObject
from mpp.runs.records import check_beside, check_new, encoder_folder

READ = """
reference = load_file(folder + "/reference.safetensors")
with torch.no_grad():
    features = model.forward_features(reference["images"])
    found = {"features": features}
    if "embedding" in reference:
        found["embedding"] = model.forward_head(features, pre_logits=True)
    if "logits" in reference:
        found["logits"] = model(reference["images"])
"""
"""Part of a program that sets `found`: outputs by name of a timm `model` for the reference images in `folder`."""
VERIFY = (
    """
import json, sys
import torch, timm
from safetensors.torch import load_file
folder, keys = sys.argv[1], json.load(open(sys.argv[1] + "/export.json"))
assert "mpp" not in sys.modules
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
stored = load_file(folder + "/model.safetensors")
state = model.state_dict()
missing, extra = sorted(state.keys() - stored.keys()), sorted(stored.keys() - state.keys())
changed = [k for k in state.keys() & stored.keys() if not torch.equal(state[k], stored[k])]
"""
    + READ
    + """
differences = [
    float((found[k] - reference[k]).abs().max() / reference[k].abs().max().clamp_min(1e-12)) for k in found
]
difference = float("nan") if any(d != d for d in differences) else max(differences)
print(json.dumps(dict(missing=missing, extra=extra, changed=changed, difference=difference,
    parameters=sum(p.numel() for p in model.parameters()))))
"""
)
"""Program that runs in a clean process without mpp, with only the packages that a user of the export has."""


@dataclass(frozen=True)
class Verified:
    """The result of a successful verification."""

    folder: Path
    difference: float
    """Largest difference of an output, divided by the largest reference value of this output."""
    parameters: int
    through: str = "plain timm"
    """Library or format by which the export was loaded."""


def export_timm_folder(run: str | Path, out: str | Path, card_sections: Sequence[tuple[str, str]] = ()) -> Verified:
    """Copy the encoder of a run and verify the copy.

    Args:
        run: A run, a trial of a fine-tuning run, or an export.
        out: The new folder.
        card_sections: (title, text) of sections to add to the model card.

    Raises:
        UserError: If `out` is not new or empty, or if verification fails.
    """
    source = encoder_folder(run)
    check_beside(Path(out), source)

    def copied(folder: Path) -> None:
        tolerance_of(source)  # errors of the source are reported with its name, not with that of the copy
        weights_sha256(source)
        shutil.copytree(source, folder)
        if card_sections:
            card = folder / "README.md"
            text = card.read_text(encoding="utf-8") if card.exists() else ""
            card.write_text(with_sections(text, card_sections), encoding="utf-8")

    return verified_at(Path(out), copied, verify_timm_folder)


def verified_at(target: Path, make: Callable[[Path], None], check: Callable[[Path], Verified]) -> Verified:
    """Make a folder that appears only after its contents have been verified.

    Args:
        target: The new folder.
        make: Function that writes the contents into a temporary folder next to `target`.
        check: Function that verifies the temporary folder.

    Raises:
        UserError: If `target` is not new or empty, if it cannot be written, or if `make` or `check` raises it.
    """
    check_new(target)
    try:
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as aside:
            copy = Path(aside) / "encoder"
            make(copy)
            try:
                verified = check(copy)
            except UserError as error:
                raise UserError(str(error).replace(str(copy), str(target))) from error
            if target.exists():  # an empty folder; it is filled, not replaced, as it may be a process's working folder
                for file in copy.iterdir():
                    os.replace(file, target / file.name)
            else:
                os.replace(copy, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written: {reason(error)}") from error
    return replace(verified, folder=target)


def is_timm_export(folder: str | Path) -> bool:
    """Return whether `verify_timm_folder` verifies a folder: an export in timm's format, or no export at all.

    `verify_timm_folder` reports the error if the folder is not an export.
    """
    try:
        return json.loads((Path(folder) / "export.json").read_text()).get("format", "timm") == "timm"
    except (OSError, ValueError, AttributeError):
        return True


def verify_timm_folder(folder: str | Path) -> Verified:
    """Load an export with plain timm in a clean process and compare its outputs.

    Raises:
        UserError: If weights, outputs or a file differ, or if the export cannot be loaded.
    """
    path = encoder_folder(folder)
    allowed = tolerance_of(path)
    weights_sha256(path)
    if has_head(path):
        check_head(path)
    if not (path / "reference.safetensors").is_file():
        raise UserError(f"{path}: reference.safetensors is missing: nothing to compare with")
    compared = found_in_clean_process(path, VERIFY, "plain timm cannot load it")
    for what in ("missing", "extra", "changed"):
        if compared[what]:
            raise UserError(f"{path}: {what} weights after loading: {', '.join(compared[what][:5])}")
    if not compared["difference"] <= allowed:
        raise UserError(f"{path}: features differ by {compared['difference']:.2e}, more than {allowed:.0e}")
    # The checksums also cover names of classes, mean and std, which do not show in the features.
    check_files(path, json.loads((path / "export.json").read_text()).get("files_sha256", {}))
    return Verified(path, compared["difference"], compared["parameters"])


def found_in_clean_process(folder: Path, program: str, otherwise: str) -> JsonObject:
    """Run a program on a folder in a new interpreter.

    Args:
        folder: Argument of the program.
        program: Source of the program.
        otherwise: Words of the message if the program fails.

    Returns:
        The JSON in the last line that the program prints.

    Raises:
        UserError: If the program fails.
    """
    process = run_in_new_interpreter(program, str(folder))
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        raise UserError(f"{folder}: {otherwise}: {lines[-1] if lines else 'no message'}")
    return json.loads(process.stdout.splitlines()[-1])


def run_in_new_interpreter(program: str, argument: str) -> subprocess.CompletedProcess[str]:
    """Run a program with one argument in a new interpreter, and return its exit status and what it printed."""
    # -I: no modules from the working folder, PYTHONPATH or the user's site packages
    command = [sys.executable, "-I", "-c", program, argument]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_files(folder: Path, checksums: dict[str, str]) -> None:
    """Check the files of an export.

    Raises:
        UserError: If a file does not match its checksum.
    """
    for name, stated in checksums.items():
        if sha256(folder / Path(name).name) != stated:
            raise UserError(f"{folder / name}: does not match the checksum of its export")


def tolerance_of(folder: Path) -> float:
    """Return the tolerance for the outputs of an export, relative to the largest reference value.

    Raises:
        UserError: If export.json cannot be read or has no tolerance.
    """
    try:
        return float(json.loads((folder / "export.json").read_text())["tolerance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable export.json: not an export of `mpp`") from error


def with_sections(card: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a model card with more sections, put before the section Limits. Titles that exist are not added again."""
    text = "".join(f"## {title}\n\n{what}\n\n" for title, what in sections if f"## {title}\n" not in card)
    before, limits, after = card.partition("## Limits\n")
    return before + text + limits + after
