"""Detection: boxes with classes, by the detectors of torchvision."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mpp.data.labeled_sets import Labels
from mpp.encoders.maps import FeatureMaps
from mpp.finetuning.pyramid import Pyramid
from mpp.finetuning.task import Judged, Outputs, Task
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import Fraction, PositiveInt


class DetectTask(Task):
    """Detect objects: a torchvision detector on a pyramid over the encoder's maps, its losses and its metrics.

    Args:
        detector: Detector of torchvision: fcos (Tian et al. 2019), retinanet (Lin et al. 2017) or faster_rcnn (Ren et
            al. 2015).
        width: Channels of every pyramid level.
        finest: Cells of the first pyramid level along each side of a cell of a plain encoder (ViTDet: 4). Hierarchical
            encoders ignore it, because their stages are the levels.
        score_threshold: Lowest score, from 0 to 1, of the detections that are kept (torchvision: 0.05).
        max_detections: Most detections per image (COCO's evaluation counts 100).
    """

    labels = "boxes"
    headline = "map"

    def __init__(
        self,
        maps: FeatureMaps,
        num_classes: int,
        *,
        detector: Literal["fcos", "retinanet", "faster_rcnn"] = "fcos",
        width: PositiveInt = 128,
        finest: Literal[1, 2, 4] = 4,
        score_threshold: Fraction = 0.05,
        max_detections: Annotated[PositiveInt, Field(le=100)] = 100,
    ) -> None:
        super().__init__()
        if detector == "fcos" and width % 32:
            raise ValueError(f"width: fcos normalises 32 groups of channels; expected a multiple of 32, got {width}")
        self.num_classes = num_classes
        self.pyramid = Pyramid(maps, width, finest=finest, last_only=True)
        handed, strides = _Handed(width), self.pyramid.strides
        if strides[0] < 1:
            raise ValueError(f"finest: {finest} makes cells of {strides[0]} px; choose a smaller value")
        few: JsonObject = {"detections_per_img": max_detections, "score_thresh": score_threshold}
        built: Any
        if detector == "fcos":
            # one anchor per cell; its size, the stride, determines which box sizes the level detects
            anchors = _Anchors([[s] for s in strides], [1.0], strides)
            built = FCOS(handed, num_classes, anchor_generator=anchors, **few)
        elif detector == "retinanet":
            # section 4 of the paper: three sizes, beginning at 4 strides, and three aspects
            sizes = [[4 * s * 2 ** (k / 3) for k in range(3)] for s in strides]
            anchors = _Anchors(sizes, [0.5, 1.0, 2.0], strides)
            built = RetinaNet(handed, num_classes, anchor_generator=anchors, **few)
        else:
            anchors = _Anchors([[8 * s] for s in strides], [0.5, 1.0, 2.0], strides)
            pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=7, sampling_ratio=2)
            # torchvision would round these scales to the nearest powers of 2
            pool.scales = [1 / s for s in strides]
            pool.map_levels = initLevelMapper(*(round(math.log2(s)) for s in (strides[0], strides[-1])))
            built = FasterRCNN(
                handed, num_classes + 1, rpn_anchor_generator=anchors, box_roi_pool=pool,
                box_detections_per_img=max_detections, box_score_thresh=score_threshold,
            )  # fmt: skip
        built.transform = _AsTheyAre()
        self.first_label = int(detector == "faster_rcnn")  # Faster R-CNN's class 0 is the background
        self.detector = built

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int], targets: Labels = None) -> Outputs:
        """Compute losses in training, and boxes otherwise.

        Args:
            maps: Feature maps of the encoder, (B, D_i, h_i, w_i) each.
            size: (H, W) of the images.
            targets: For each image, boxes (n, 4) as x0, y0, x1, y1 and labels (n,). Required in training.

        Returns:
            In training, the losses by name. Otherwise, for each image, boxes (n, 4) in pixels of the (H, W) image,
            labels and scores (n,).
        """
        with torch.autocast(maps[0].device.type, enabled=False):  # boxes need more precision than bfloat16 has
            levels = self.pyramid([m.float() for m in maps])
            self.detector.backbone.maps = OrderedDict((str(i), level) for i, level in enumerate(levels))
            images = list(maps[0].new_empty((len(maps[0]), 1, *size), dtype=torch.float32))
            if targets is not None:
                targets = [{"boxes": t["boxes"], "labels": t["labels"] + self.first_label} for t in targets]
            try:
                outputs = self.detector(images, targets)
            finally:
                self.detector.backbone.maps = None
        if not self.training:
            for detections in outputs:
                detections["labels"] = detections["labels"] - self.first_label
        return outputs

    def loss(self, losses: dict[str, Tensor], targets: object) -> Tensor:
        return torch.stack(list(losses.values())).sum()

    def judge(
        self, run: Callable[[Tensor], Outputs], images: Tensor, targets: list[dict[str, Tensor]], size: tuple[int, int]
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Return (predicted, true) of each image, with boxes in pixels of the file, on the CPU."""
        return list(zip(self.predict(run, images, targets), targets, strict=True))

    @torch.no_grad()
    def predict(
        self, run: Callable[[Tensor], Outputs], images: Tensor, targets: Sequence[dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Predict boxes in pixels of the image files.

        Args:
            run: Model that maps images to the outputs of `forward`.
            images: (B, C, H, W) in [0, 255], each image scaled into the upper left of its canvas.
            targets: For each file, `scale` (pixels of the canvas per pixel of the file) and `size` (h, w) in pixels.

        Returns:
            Boxes, scores and labels of each image, on the CPU.
        """
        in_pixels = []
        for detections, target in zip(run(images), targets, strict=True):
            on_host = {key: value.detach().cpu() for key, value in detections.items()}
            h, w = target["size"].tolist()
            limits = torch.tensor([w, h, w, h], dtype=torch.float32)
            boxes = (on_host["boxes"] / target["scale"]).clamp_min(0).minimum(limits)
            # Keep boxes with sides of at least a pixel. Clamped boxes from the grey padding have no area.
            there = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            in_pixels.append(
                {"boxes": boxes[there], "scores": on_host["scores"][there], "labels": on_host["labels"][there]}
            )
        return in_pixels

    def metrics(self, judged: list[object], *, headline_only: bool = False) -> dict[str, float]:
        """Return average precision and recall, as COCO's own evaluation computes them.

        map: mean over classes and overlaps from 0.50 to 0.95.
        map_50, map_75: map at one overlap.
        map_small, map_medium, map_large: map of boxes below 32² pixels, from 32² to 96² pixels, and above.
        mar_100: mean recall with at most 100 detections per image.
        """
        result = self._coco(judged)
        if headline_only:
            return {"map": max(float(result["map"]), 0.0)}
        wanted = ("map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
        # torchmetrics returns -1 for box sizes that do not occur
        return {"map": max(float(result["map"]), 0.0)} | {k: float(result[k]) for k in wanted if result[k] >= 0}

    def per_class(self, judged: list[object]) -> Tensor:
        """Return the average precision of each class, (classes,); nan for a class that does not occur."""
        result = self._coco(judged, each=True)
        of_class = torch.full((self.num_classes,), float("nan"), dtype=torch.float64)
        places, values = torch.atleast_1d(result["classes"]), torch.atleast_1d(result["map_per_class"])
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            of_class[place] = value if value >= 0 else float("nan")
        return of_class

    def _coco(self, judged: list[Judged], *, each: bool = False) -> dict[str, Tensor]:
        from torchmetrics.detection import MeanAveragePrecision  # imported here because the import takes seconds

        metric = MeanAveragePrecision(class_metrics=each)
        for batch in judged:
            metric.update(
                [detections for detections, _ in batch],
                [{key: true[key] for key in ("boxes", "labels", "iscrowd", "area")} for _, true in batch],
            )
        return metric.compute()


class _Anchors(AnchorGenerator):
    """Boxes of given sizes and aspects (height over width) around the centre of every cell.

    torchvision's own anchors are centred on the corners of cells and rounded to pixels. It also computes the stride of
    a level as the image side divided by the number of cells, rounded down. With patches of 14 px its anchors therefore
    drift by 32 px across an image of 224 px.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], aspects: Sequence[float], strides: Sequence[float]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspects),) * len(sizes))
        self.level_strides = list(strides)
        self.cell_anchors = []
        for of_level in sizes:
            half = [(s / math.sqrt(a) / 2, s * math.sqrt(a) / 2) for a in aspects for s in of_level]
            self.cell_anchors.append(torch.tensor([[-w, -h, w, h] for w, h in half]))

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        anchors_of_levels = []
        for anchors, stride, level in zip(self.cell_anchors, self.level_strides, feature_maps, strict=True):
            y, x = (stride * (torch.arange(n, device=level.device) + 0.5) for n in level.shape[-2:])
            centres = torch.stack([*torch.meshgrid(y, x, indexing="ij")][::-1], -1).repeat(1, 1, 2).view(-1, 1, 4)
            anchors_of_levels.append((centres + anchors.to(level.device)).view(-1, 4))
        return [torch.cat(anchors_of_levels)] * len(image_list.image_sizes)


class _Handed(nn.Module):
    """Backbone of a detector that returns feature maps computed earlier."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.maps: OrderedDict[str, Tensor] | None = None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        assert self.maps is not None
        return self.maps


class _AsTheyAre(nn.Module):
    """Transform of a detector that changes nothing, because images are already normalised and resized."""

    def forward(self, images: list[Tensor], targets: object = None) -> tuple[ImageList, object]:
        return ImageList(torch.stack(images), [(i.shape[-2], i.shape[-1]) for i in images]), targets

    def postprocess(self, result: object, image_sizes: object, original: object) -> object:
        return result
