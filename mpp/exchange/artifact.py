"""The encoder from which an export is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mpp.encoders.folder import pixels_of
from mpp.encoders.timm_model import TimmModel
from mpp.recipe.flat import JsonObject
from mpp.recipe.sections import ValueRange


@dataclass(frozen=True)
class Artifact:
    """An encoder with everything that is needed to write it in formats other than timm's."""

    source: Path
    """The timm folder of the encoder."""
    timm: TimmModel
    """The timm model of the encoder."""
    model: nn.Module
    """Model from (B, C, H, W) normalised images to outputs by name: features, embedding and logits of a classifier; or
    logits of pixels."""
    outputs: tuple[str, ...]
    config: JsonObject
    """Contents of timm's config.json."""
    classes: list[str] | None
    reference: dict[str, torch.Tensor]
    """Two images, and the outputs for them. Outputs that the folder lacks are computed."""
    tolerance: float
    task: str | None
    """Task of a fine-tuned model. With multilabel, each class has its own logit."""
    value_range: ValueRange | None
    """Pixel values that became 0 and 1 in images that were not read as 8 bit. None if images were read as 8 bit."""

    def reading_line(self) -> str:
        """Return the line of a usage example that takes the main result from the dictionary of outputs, `found`."""
        if "logits" in self.outputs:
            return 'logits = found["logits"]'
        if "embedding" in self.outputs:
            return f'embedding = found["embedding"]  # (N, {self.config["num_features"]})'
        return f'embedding = found["features"][:, {self.timm.num_prefix_tokens}:].mean(1)'

    def described(self) -> dict[str, str]:
        """Return the metadata for a file that is used without the folder: normalisation, task, names of classes."""
        cfg = self.config["pretrained_cfg"]
        facts = {key: json.dumps(cfg[key]) for key in ("input_size", "mean", "std")}
        facts |= {"mean_and_std_of": pixels_of(self.value_range)} | ({"task": self.task} if self.task else {})
        return facts | ({"classes": json.dumps(self.classes)} if self.classes else {})
