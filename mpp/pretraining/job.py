"""A pretraining run that is ready to train, with everything that its loop uses."""

from __future__ import annotations

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
    sharded: bool
    """Whether each process holds a part of the weights."""
    whole: Whole[MaskedPatchModel]
    """A copy of the model with all its weights, for evaluation, pictures and the export."""
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
