"""Learn from a teacher with a classifier in addition to the labels (DeiT, Touvron et al. 2021, section 4).

The teacher sees the same mixed and augmented images as the student, at its own size and normalisation. Several models
together are one teacher, whose probabilities are the mean of theirs (Hinton et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.encoders.sources import check_source, class_names, is_timm_name, load_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.runs.records import encoder_folder


class Teacher:
    """A frozen classifier, which sees images as its student does, but at its own size and normalisation.

    Args:
        model: Timm model with a classifier.
        mean: Mean by which the student's pixels are normalised, (C, 1, 1) in [0, 1].
        std: Standard deviation by which the student's pixels are normalised, (C, 1, 1) in [0, 1].
    """

    def __init__(self, model: nn.Module, *, mean: Tensor, std: Tensor) -> None:
        self.model: TimmModel = model.requires_grad_(False).eval()
        timm_config: TimmModel = model.pretrained_cfg
        self.size = tuple(timm_config["input_size"][1:])
        own = (torch.tensor(timm_config[key], device=mean.device).view(-1, 1, 1) for key in ("mean", "std"))
        own_mean, own_std = own
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, (B, classes) float32, for images (B, C, H, W) as the student sees them."""
        x = x * self.scale + self.shift
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False)
        logits: Tensor = self.model(x).float()
        return logits


class Distillation:
    """The teacher and the loss of learning from it.

    Args:
        teachers: Timm models, the mean of whose probabilities is learned.
        kind: "hard" if the teacher's likeliest class is a second label. "soft" for the divergence from the teacher's
            probabilities at `temperature`, multiplied by temperature².
        alpha: Weight of the teacher's part of the loss, from 0 to 1. The labels have the weight 1 - alpha.
        temperature: Temperature of the softmax, for "soft".
        mean: Mean by which the student's pixels are normalised, (C, 1, 1) in [0, 1].
        std: Standard deviation by which the student's pixels are normalised, (C, 1, 1) in [0, 1].
        autocast: Autocast context of the run.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        kind: Literal["hard", "soft"],
        alpha: float,
        temperature: float,
        mean: Tensor,
        std: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.teachers = [Teacher(model, mean=mean, std=std) for model in teachers]
        self.autocast = autocast
        self.kind, self.alpha, self.temperature = kind, alpha, temperature

    @torch.no_grad()
    def teach(self, x: Tensor) -> Tensor:
        """Return the teacher's logits, (B, classes) float32, for images (B, C, H, W) as the student sees them.

        Of several models, these are the logarithms of their mean probabilities.
        """
        with self.autocast():
            logits = [teacher(x) for teacher in self.teachers]
        if len(logits) == 1:
            return logits[0]
        return torch.stack(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))

    def loss(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        x: Tensor,
        labels: Tensor,
        task_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss of learning from labels and teacher together.

        Args:
            logits: Logits of the student, (B + U, classes). A model with a distillation head gives two of these
                tensors, and the second learns only from the teacher.
            x: B images with labels, then U images without, (B + U, C, H, W), normalised for the student.
            labels: Labels of the first B images.
            task_loss: Function that returns the loss of logits and labels.
        """
        first, second = logits if isinstance(logits, tuple) else (logits, logits)
        taught, second = self.teach(x), second.float()
        if self.kind == "hard":
            theirs = F.cross_entropy(second, taught.argmax(-1))
        else:
            t = self.temperature
            a, b = (second / t).log_softmax(-1), (taught / t).log_softmax(-1)
            theirs = t * t * F.kl_div(a, b, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * task_loss(first[: len(labels)], labels) + self.alpha * theirs


def open_teacher(source: str, classes: Sequence[str], channels: int) -> nn.Module:
    """Open a timm model with a classifier of these classes.

    Args:
        source: Fine-tuned model, its export, or the name of a timm model.
        classes: Names of the classes that the teacher must have. For timm models only their number is checked.
        channels: Number of image channels that the teacher must read.

    Raises:
        UserError: If the teacher has no classifier, has other classes, or reads another number of channels.
    """
    check_source(source, key="distill.teacher")
    if is_timm_name(source):
        try:
            model: TimmModel = timm.create_model(source, pretrained=True)
        except Exception as error:  # timm, torch and the hub raise different errors
            words = one_line(error)
            raise UserError(f"distill.teacher: {source}: {type(error).__name__}: {words}") from error
        names = None
    else:
        folder = encoder_folder(source)
        model = load_encoder(folder)
        names = class_names(folder)
    if not model.num_classes:
        raise UserError(f"distill.teacher: {source} has no classifier; give a fine-tuned model")
    if model.num_classes != len(classes):
        raise UserError(
            f"distill.teacher: {source} has {model.num_classes} classes; the training data has {len(classes)}"
        )
    if names is not None and names != list(classes):
        off = next(i for i, (a, b) in enumerate(zip(names, classes, strict=True)) if a != b)
        raise UserError(
            f"distill.teacher: {source}: class {off} is '{names[off]}', but '{classes[off]}' in the training data"
        )
    reads = model.pretrained_cfg["input_size"][0]
    if reads != channels:
        raise UserError(f"distill.teacher: {source} reads {reads} channels; data.channels is {channels}")
    return model
