"""Write a program of `torch.export`: a graph with its weights, for batches of any size, which runs without timm."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mpp.exchange.artifact import Artifact

EXTRA, NEEDS = "", ()

USE = """
import torch

encoder = torch.export.load("FOLDER/model.pt2").module()
found = encoder(images)  # (N, channels, H, W) float32, normalised as below
"""


def use(artifact: Artifact, folder: Path) -> str:
    return USE + artifact.reading_line()


def write(artifact: Artifact, folder: Path) -> str:
    """Write model.pt2, a program that returns a dictionary of outputs.

    Returns:
        The release of torch, for the model card.
    """
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(
            artifact.model,
            (artifact.reference["images"],),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )
        torch.export.save(program, folder / "model.pt2", extra_files=artifact.described())
    return f"torch {torch.__version__}"


VERIFY = """
import sys
import torch
from safetensors.torch import load_file
folder = sys.argv[1]
model = torch.export.load(folder + "/model.pt2").module()
reference = load_file(folder + "/reference.safetensors")
images = reference["images"]
with torch.no_grad():
    runs = [(model(images[:1]), [0]), (model(images[[1, 0, 1]]), [1, 0, 1])]
"""
