"""What every export format is written from."""

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
    """What other formats than timm's are written from."""

    source: Path
    """The timm folder."""
    timm: TimmModel
    """Its model."""
    model: nn.Module
    """(B, C, H, W) normalised -> outputs by name: features, embedding, logits of a classifier; or logits of pixels."""
    outputs: tuple[str, ...]
    config: JsonObject
    """timm's config.json."""
    classes: list[str] | None
    reference: dict[str, torch.Tensor]
    """Two images, and the outputs that the folder states for them."""
    tolerance: float
    task: str | None
    """Of a fine-tuned model; multilabel: logits are of each class by itself."""
    value_range: ValueRange | None
    """What counted as 0 and 1 in images that were not read as 8 bit; None for those that were."""

    def reading_line(self) -> str:
        """The line of a card that takes what is wanted of the outputs `found`, a dictionary."""
        if "logits" in self.outputs:
            return 'logits = found["logits"]'
        if "embedding" in self.outputs:
            return f'embedding = found["embedding"]  # (N, {self.config["num_features"]})'
        return f'embedding = found["features"][:, {self.timm.num_prefix_tokens}:].mean(1)'

    def described(self) -> dict[str, str]:
        """What a file that stands alone says of itself."""
        cfg = self.config["pretrained_cfg"]
        facts = {key: json.dumps(cfg[key]) for key in ("input_size", "mean", "std")}
        facts |= {"mean_and_std_of": pixels_of(self.value_range)} | ({"task": self.task} if self.task else {})
        return facts | ({"classes": json.dumps(self.classes)} if self.classes else {})
