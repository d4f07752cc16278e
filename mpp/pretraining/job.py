"""A pretraining run that is ready to train, with everything that its loop uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from mpp.data.batch import Batch
from mpp.data.order import MicroBatches
from mpp.objective.model import MaskedPatchModel
from mpp.parallel.liveness import Watch
from mpp.parallel.sharding import Whole
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import Team
from mpp.pretraining.dataset import PretrainDataset
from mpp.pretraining.monitor import OnlineProbe
from mpp.pretraining.progress import Progress
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs.folder import OpenRun
from mpp.runs.log import RunLog
from mpp.training import nonfinite
from mpp.training.device_time import DeviceTime
from mpp.training.optimizer import GuardedOptimizer
from mpp.training.plan import Plan
from mpp.training.steps import MicroBatchStream, Pace


@dataclass
class Pretraining:
    """A run that is ready to train."""

    recipe: PretrainRecipe
    """The resolved recipe, which does not change any more."""
    team: Team
    plan: Plan
    dataset: PretrainDataset
    sampler: MicroBatches
    """This process's micro-batches, from the first step that is still to do."""
    held_out: Batch
    """Images that are never trained on, each with the mask it has in every run of this seed."""
    model: MaskedPatchModel
    wrapped: nn.Module
    """The model as the loop calls it: in autocast, with gradients exchanged."""
    averaged: nn.Module | None
    """Timm encoder with a moving average of the weights. None if the recipe has no `ema_decay`."""
    sharded: bool
    """Whether each process holds a part of the weights."""
    whole: Whole[MaskedPatchModel]
    """A copy of the model with all its weights, for evaluation, pictures and the export."""
    whole_averaged: Whole[nn.Module] | None
    """The same of the averaged encoder."""
    optimizer: GuardedOptimizer
    trained: list[nn.Parameter]
    batch_norms: nonfinite.BatchNormStatistics
    progress: Progress
    micro_batches: MicroBatchStream[Batch]
    pace: Pace
    device_time: DeviceTime
    probe: OnlineProbe | None
    run: OpenRun
    log: RunLog
    watch: Watch
    stop_request: StopRequest

    @contextmanager
    def whole_encoder(self) -> Iterator[nn.Module]:
        """Return a context with the timm encoder to probe and export, on the device. Every process must call this.

        It has the averaged weights if there are any, and the current ones otherwise.
        """
        if self.whole_averaged is not None:
            with self.whole_averaged.on_device(self.team.device) as encoder:
                yield encoder
        else:
            with self.whole.on_device(self.team.device) as model:
                yield model.encoder.model
