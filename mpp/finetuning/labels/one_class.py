"""One class for each image."""

from __future__ import annotations

from typing import ClassVar

from mpp.finetuning.image_labels import ImageLabels


class OneClassLabels(ImageLabels):
    """Labels with one class per image: the name of its folder, or an entry in the shards or the CSV file."""

    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {"data.val_side_px": (None,)}
    least_classes = 2
