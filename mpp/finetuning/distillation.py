"""A teacher with a classifier beside the labels (DeiT, Touvron et al. 2021, section 4), hard or soft.

The teacher sees the images that the student sees, mixed and augmented, at its own size and normalisation.
"""

from __future__ import annotations

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


class Distillation:
    """The teacher, and the loss that it is part of.

    Args:
        teacher: Its logits are learned.
        kind: "hard": its likeliest class is a second label; "soft": the divergence from its probabilities at
            `temperature`, times temperature².
        alpha: The teacher's part of the loss.
        temperature: See `kind`.
        mean: Of the model's pixels.
        std: Of the model's pixels.
        autocast: As of the run.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        kind: Literal["hard", "soft"],
        alpha: float,
        temperature: float,
        mean: Tensor,
        std: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """mean, std: (C, 1, 1), by which the student's pixels were normalised, in [0, 1]. autocast: the run's."""
        self.teacher: TimmModel = teacher.requires_grad_(False).eval()
        self.autocast = autocast
        self.kind, self.alpha, self.temperature = kind, alpha, temperature
        timm_config: TimmModel = teacher.pretrained_cfg
        self.size = tuple(timm_config["input_size"][1:])
        of_teacher = (torch.tensor(timm_config[key], device=mean.device).view(-1, 1, 1) for key in ("mean", "std"))
        teacher_mean, teacher_std = of_teacher
        self.scale, self.shift = std / teacher_std, (mean - teacher_mean) / teacher_std

    @torch.no_grad()
    def teach(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as the student sees them -> (B, classes) float32 logits."""
        x = x * self.scale + self.shift
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False)
        with self.autocast():
            return self.teacher(x).float()

    def loss(
        self,
        logits: Tensor | tuple[Tensor, Tensor],
        x: Tensor,
        labels: Tensor,
        task_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Compute the loss of learning from labels and teacher at once.

        Args:
            logits: (B + U, classes). For a model with a distillation head two of these; the second learns from the
                teacher alone.
            x: (B + U, C, H, W), normalised for the model: images with labels, then those without.
            labels: Of the first B images.
            task_loss: Loss of logits and labels.
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
        source: A fine-tuned model, its export, or one of timm's names.
        classes: Those that it must have.
        channels: Those that it must read.

    Raises:
        UserError: It has no classifier or one of other classes, or reads other channels.
    """
    check_source(source, key="distill.teacher")
    if is_timm_name(source):
        try:
            model: TimmModel = timm.create_model(source, pretrained=True)
        except Exception as error:  # timm's, torch's or the hub's
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
            f"distill.teacher: {source} tells {model.num_classes} classes apart; the training data has {len(classes)}"
        )
    if names is not None and names != list(classes):
        off = next(i for i, (a, b) in enumerate(zip(names, classes, strict=True)) if a != b)
        raise UserError(
            f"distill.teacher: {source}: its class {off} is '{names[off]}', that of the training data '{classes[off]}'"
        )
    reads = model.pretrained_cfg["input_size"][0]
    if reads != channels:
        raise UserError(f"distill.teacher: {source} reads {reads} channels; data.channels is {channels}")
    return model
