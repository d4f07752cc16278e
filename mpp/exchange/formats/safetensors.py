"""Write only the weights, with timm's names, and a description of their architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mpp.encoders.checksums import HEAD
from mpp.encoders.folder import reading_line
from mpp.exchange.artifact import Artifact
from mpp.exchange.verify import READ

EXTRA, NEEDS = "", ()

USE = """
import json, timm
from safetensors.torch import load_file

made = json.load(open("FOLDER/architecture.json"))
model = timm.create_model(made["architecture"], num_classes=made["num_classes"], **made["model_args"])
model.load_state_dict(load_file("FOLDER/weights.safetensors"))
"""


def use(artifact: Artifact, folder: Path) -> str:
    return USE + reading_line(artifact.timm)


def write(artifact: Artifact, folder: Path) -> str:
    """Write weights.safetensors, architecture.json, and the head of a dense task, if there is one.

    Returns:
        The name of the weight file, for the model card.
    """
    config = artifact.config
    shutil.copy(artifact.source / "model.safetensors", folder / "weights.safetensors")
    if (artifact.source / HEAD).exists():
        shutil.copy(artifact.source / HEAD, folder / HEAD)
    made = {key: config.get(key) for key in ("architecture", "label_names")}
    args = config.get("model_args") or {}
    if config.get("global_pool") is not None:
        args = {"global_pool": config["global_pool"], **args}
    made |= {"model_args": args, "num_classes": artifact.timm.num_classes}
    (folder / "architecture.json").write_text(json.dumps(made, indent=1))
    return "weights.safetensors"


VERIFY = (
    """
import json, sys
import timm, torch
from safetensors.torch import load_file
folder = sys.argv[1]
made = json.load(open(folder + "/architecture.json"))
model = timm.create_model(made["architecture"], num_classes=made["num_classes"], **made["model_args"]).eval()
model.load_state_dict(load_file(folder + "/weights.safetensors"))
"""
    + READ
    + "runs = [(found, [0, 1])]\n"
)
