"""Checksums of an encoder folder, read without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mpp.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of features, relative to their largest value, that counts as equal. It allows for rounding in
float32 on other hardware."""
HEAD = "head.safetensors"
"""File of a fine-tuned model's head, next to the encoder. It exists if timm cannot store the head."""


def weights_sha256(folder: Path) -> str:
    """Return the checksum of an export's weights.

    Raises:
        UserError: If the weights differ from those that were exported, or export.json cannot be read.
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
    """Return whether export.json records a head that was saved with the encoder."""
    try:
        return "head_sha256" in json.loads((folder / "export.json").read_text())
    except (OSError, ValueError):
        return False  # a timm folder made elsewhere, or an unreadable export.json


def check_head(folder: Path) -> list[str]:
    """Check the head that was saved with an encoder, and return its class names.

    Raises:
        UserError: If the head is missing or damaged.
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
    """Return the SHA-256 checksum of a file.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
