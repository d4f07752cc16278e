"""Checksums of an encoder folder, read without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mpp.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of features, over their largest value, that counts as the same: float32 on other hardware."""
HEAD = "head.safetensors"
"""Beside the encoder of a fine-tuned model, where timm has no place for its head."""


def weights_sha256(folder: Path) -> str:
    """Return the checksum of an export's weights.

    Raises:
        UserError: They are not those that were exported.
    """
    computed = sha256(folder / "model.safetensors")
    try:
        about = json.loads((folder / "export.json").read_text())
        stated = about["files_sha256"]["model.safetensors"] if "format" in about else about["weights_sha256"]
    except FileNotFoundError:
        return computed  # a timm folder made elsewhere
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable export.json") from error
    if computed != stated:
        raise UserError(f"{folder}/model.safetensors: does not match the checksum of its export")
    return computed


def has_head(folder: Path) -> bool:
    """Whether a head was saved beside the encoder, and should be there."""
    try:
        return "head_sha256" in json.loads((folder / "export.json").read_text())
    except (OSError, ValueError):
        return False  # a timm folder made elsewhere, or said by others


def check_head(folder: Path) -> list[str]:
    """Return the classes of the head that was saved beside an encoder.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        stated = json.loads((folder / "export.json").read_text())["head_sha256"]
        if sha256(folder / HEAD) != stated:
            raise UserError(f"{folder / HEAD}: does not match the checksum of its export")
        with safe_open(folder / HEAD, "np") as file:
            return [str(c) for c in json.loads(file.metadata()["classes"])]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable {HEAD} with its checksum in export.json") from error


def sha256(path: Path) -> str:
    """Return the checksum of a file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
