"""An exported encoder, copied, loaded by plain timm in a clean process, and compared. Without torch in this process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mpp.errors import UserError, reason
from mpp.records import check_beside, check_new, encoder_folder

TOLERANCE = 1e-4
"""Largest difference of features, over their largest value, that counts as the same: float32 on other hardware."""
HEAD = "head.safetensors"
"""Beside the encoder of a fine-tuned model, where timm has no place for its head."""
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
"""Part of a program: what a timm `model` gives for the reference images in `folder`, by name, as `found`."""
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
"""Runs in a clean process: no mpp, only what a user of the artifact has."""


@dataclass(frozen=True)
class Verified:
    """What `verify` found; raised as UserError where it does not hold."""

    folder: Path
    difference: float
    """Largest difference of features and embedding over the largest reference value."""
    parameters: int
    through: str = "plain timm"
    """What loaded it."""


def weights_sha256(folder: Path) -> str:
    """Checksum of an export's weights. UserError where they are not those that were exported."""
    found = sha256(folder / "model.safetensors")
    try:
        about = json.loads((folder / "export.json").read_text())
        stated = about["files_sha256"]["model.safetensors"] if "format" in about else about["weights_sha256"]
    except FileNotFoundError:
        return found  # a timm folder made elsewhere
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable export.json") from error
    if found != stated:
        raise UserError(f"{folder}/model.safetensors: does not match the checksum of its export")
    return found


def has_head(folder: Path) -> bool:
    """Whether a head was saved beside the encoder, and should be there."""
    try:
        return "head_sha256" in json.loads((folder / "export.json").read_text())
    except (OSError, ValueError):
        return False  # a timm folder made elsewhere, or said by others


def check_head(folder: Path) -> list[str]:
    """The classes of the head that was saved beside an encoder. UserError where it is missing or damaged."""
    try:
        stated = json.loads((folder / "export.json").read_text())["head_sha256"]
        if sha256(folder / HEAD) != stated:
            raise UserError(f"{folder / HEAD}: does not match the checksum of its export")
        with safe_open(folder / HEAD, "np") as file:
            return [str(c) for c in json.loads(file.metadata()["classes"])]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable {HEAD} with its checksum in export.json") from error


def export(run: str | Path, out: str | Path, told: Sequence[tuple[str, str]] = ()) -> Verified:
    """Copy a run's encoder to `out` and verify it there. UserError where `out` is not new or empty.

    told: (title, text) of sections for its model card.
    """
    source = encoder_folder(run)
    check_beside(Path(out), source)

    def copied(folder: Path) -> None:
        tolerance(source)  # what is wrong with the source is said with its name, not that of the copy
        weights_sha256(source)
        shutil.copytree(source, folder)
        if told:
            card = folder / "README.md"
            own = card.read_text(encoding="utf-8") if card.exists() else ""
            card.write_text(with_sections(own, told), encoding="utf-8")

    return verified_at(Path(out), copied, verify)


def verified_at(target: Path, make: Callable[[Path], None], check: Callable[[Path], Verified]) -> Verified:
    """A new folder that comes into being once what is made for it was verified by `check`. UserError."""
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
            if target.exists():  # an empty folder, perhaps somebody's working folder
                for file in copy.iterdir():
                    os.replace(file, target / file.name)
            else:
                os.replace(copy, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written: {reason(error)}") from error
    return replace(verified, folder=target)


def is_timm_export(folder: str | Path) -> bool:
    """Whether a folder is to be verified as timm's: also one that is no export at all, which `verify` says."""
    try:
        return json.loads((Path(folder) / "export.json").read_text()).get("format", "timm") == "timm"
    except (OSError, ValueError, AttributeError):
        return True


def verify(folder: str | Path) -> Verified:
    """Load an export through plain timm in a clean process and compare. UserError where anything differs."""
    path = encoder_folder(folder)
    allowed = tolerance(path)
    weights_sha256(path)
    if has_head(path):
        check_head(path)
    if not (path / "reference.safetensors").is_file():
        raise UserError(f"{path}: reference.safetensors is missing: nothing to compare with")
    found = found_in_clean_process(path, VERIFY, "plain timm cannot load it")
    for what in ("missing", "extra", "changed"):
        if found[what]:
            raise UserError(f"{path}: {what} weights after loading: {', '.join(found[what][:5])}")
    if not found["difference"] <= allowed:
        raise UserError(f"{path}: features differ by {found['difference']:.2e}, allowed is {allowed:.0e}")
    # names of classes, mean and std, which no feature shows
    check_files(path, json.loads((path / "export.json").read_text()).get("files_sha256", {}))
    return Verified(path, found["difference"], found["parameters"])


def found_in_clean_process(folder: Path, program: str, otherwise: str) -> Any:
    """What a program prints of a folder, as JSON in its last line. UserError, `otherwise`, where it fails."""
    # -I: neither this folder, nor PYTHONPATH, nor the user's site can lend it a module
    process = subprocess.run(
        [sys.executable, "-I", "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        raise UserError(f"{folder}: {otherwise}: {lines[-1] if lines else 'no message'}")
    return json.loads(process.stdout.splitlines()[-1])


def check_files(folder: Path, checksums: dict[str, str]) -> None:
    """UserError where a file of an export is not what was written."""
    for name, stated in checksums.items():
        if sha256(folder / Path(name).name) != stated:
            raise UserError(f"{folder / name}: does not match the checksum of its export")


def tolerance(folder: Path) -> float:
    """Of an export's features. UserError where it does not say."""
    try:
        return float(json.loads((folder / "export.json").read_text())["tolerance"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable export.json: not an export of `mpp`") from error


def sha256(path: Path) -> str:
    """Of a file. UserError where it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def with_sections(card: str, told: Sequence[tuple[str, str]]) -> str:
    """A model card with more sections, before its limits."""
    text = "".join(f"## {title}\n\n{what}\n\n" for title, what in told if f"## {title}\n" not in card)
    before, limits, after = card.partition("## Limits\n")
    return before + text + limits + after
