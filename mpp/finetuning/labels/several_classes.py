"""Any number of classes for each image."""

from __future__ import annotations

from typing import ClassVar

from mpp.finetuning.image_labels import ImageLabels


class SeveralClassesLabels(ImageLabels):
    """Labels with any number of classes per image, separated by semicolons in the shards or the CSV file."""

    allowed_values: ClassVar[dict[str, tuple[object, ...]]] = {
        "mixup": (0.0,),
        "cutmix": (0.0,),
        "balance": ("none",),
        "distill": (None,),
        "head_init": ("zero",),
        "data.labels_per_class": (None,),
        "data.val_side_px": (None,),
    }
    independent_classes = True
