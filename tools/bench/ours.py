"""mpp on the workloads of `sizes`, through the code that runs a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pictures import labeled
from sizes import (
    CROP_SCALE,
    EMBEDDED_BATCH,
    EMBEDDERS,
    EVALUATION_BATCH,
    MASK_RATIO,
    MEAN,
    SIZES,
    STD,
    Size,
    decoder_of,
)
from torch import Tensor
from training import Gemm, TrainStep, photographs

import mpp
from mpp.data.crop import Crop
from mpp.data.loader import batches
from mpp.data.order import MicroBatches, Order
from mpp.data.shards.reader import ShardImages
from mpp.encoders.folder import trained_by
from mpp.evaluation.run import evaluate
from mpp.exchange.import_weights import export_model
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.masks.uniform import UniformMask
from mpp.parallel.devices import compile_forward, write_attention_out
from mpp.pretraining.dataset import PretrainDataset
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs import checkpoint
from mpp.runs.records import checkpoints_in

COMPILED = ", compiled"
PREDICT_FRACTION = 1 / 3
"""Fraction of the hidden cells that is predicted. CrossMAE, Fu et al. 2024, table 2c: a third is as good as all."""


def recipe(size: Size, **more: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "job": "pretrain",
        "out": "unused",
        "data": {"shards": "unused", "image_size": size.image_px},
        "encoder": {
            "name": "vit_tiny_patch16_224",
            "args": {
                "patch_size": size.patch_px,
                "embed_dim": size.dim,
                "depth": size.depth,
                "num_heads": size.heads,
            },
        },
        "mask": {"name": "uniform", "ratio": MASK_RATIO},
        "target": {"name": "norm_pixels"},
        "head": {"name": "linear"},
        "optim": {"steps": 1, "global_batch_size": size.batch},
    }
    return PretrainRecipe.model_validate(values | more)


def _head(name: str, size: Size, decoder: str) -> dict[str, Any]:
    d = decoder_of(size, decoder)
    return {"name": name, "dim": d.dim, "depth": d.depth, "num_heads": d.heads}


OBJECTIVES: dict[str, Callable[[Size, str], dict[str, Any]]] = {
    "mpp late, 1 block, a third": lambda size, decoder: {
        "corruption": {"name": "token", "enter": size.depth - 1},
        "predict_fraction": PREDICT_FRACTION,
    },
    "mpp late, 2 blocks, a third": lambda size, decoder: {
        "corruption": {"name": "token", "enter": max(size.depth - 2, 1)},
        "predict_fraction": PREDICT_FRACTION,
    },
    "mpp late, 1 block": lambda size, decoder: {"corruption": {"name": "token", "enter": size.depth - 1}},
    "mpp CrossMAE": lambda size, decoder: {
        "corruption": {"name": "drop"},
        "head": _head("cross_attention", size, decoder),
        "predict_fraction": PREDICT_FRACTION,
    },
    "mpp MAE": lambda size, decoder: {
        "corruption": {"name": "drop"},
        "head": _head("transformer", size, decoder),
    },
    "mpp SimMIM": lambda size, decoder: {"corruption": {"name": "token", "enter": 0}},
}


def _step(name: str) -> Callable[..., TrainStep]:
    def build(size: str, decoder: str, precision: str, device: str = "cpu", batch: int = 0) -> TrainStep:
        write_attention_out(precision == "bf16" and device == "cpu")
        s = SIZES[size]._replace(batch=batch) if batch else SIZES[size]
        made = recipe(s, **OBJECTIVES[name.removesuffix(COMPILED)](s, decoder))
        model, grid = build_model(made)
        model.to(device)
        if name.endswith(COMPILED):
            compile_forward(model, torch.device(device))
        mask = build_mask(made)
        images = photographs(s.batch, s.image_px).to(device)
        position, drawn = 0, None

        def loss() -> Tensor:
            nonlocal position, drawn
            if drawn is None or device == "cpu":  # also draws masks, because peers draw theirs in the step
                position += s.batch
                units = draw_masks(mask, grid, 0.5, 0, range(position, position + s.batch))
                drawn = units.tensors_by(lambda t: t.to(device))  # for a GPU, workers draw them
            return model(images, drawn).sum()

        return TrainStep(model, loss, s.batch, precision, device)

    return build


STEP: dict[str, Callable[..., Any]] = {name: _step(name) for name in OBJECTIVES}
STEP |= {name + COMPILED: _step(name + COMPILED) for name in OBJECTIVES}
STEP["GEMM"] = lambda size, decoder, precision, device="cpu", batch=0: Gemm(precision, device)


class Input:
    """A dataloader to be timed. A unit of work is a batch with its masks, normalised as the model does it.

    Args:
        pictures: Prefix of the shards' folder.
        side_px: Side of the crops in pixels.
        batch: Number of images in a batch.
        workers: Number of processes that read. 0 means that this process reads.
    """

    def __init__(self, pictures: str, side_px: int, batch: int, workers: int = 0) -> None:
        torch.set_num_threads(1)  # as in a dataloader worker
        images = ShardImages(f"{pictures}-shards", key="data.shards")
        order = Order(images.counts, global_batch=batch, seed=0)
        size = (side_px, side_px)
        crop = Crop(size, 3, CROP_SCALE, (3 / 4, 4 / 3), 0.5, ("JPEG",), 64_000_000)
        grid = (side_px // (4 if side_px < 224 else 16),) * 2
        dataset = PretrainDataset(images, crop, UniformMask(ratio=MASK_RATIO), grid, 0, images.counts, batch)
        self.batches = batches(
            dataset, MicroBatches(order, seen=0, steps=10**9, accumulate=1), workers=workers, pin_memory=False
        )
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        self.facts: dict[str, Any] = {}

    def run(self, count: int) -> int:
        images = 0
        for _ in range(count):
            raw = next(self.batches).images
            images += len((raw - 255 * self.mean).div_(255 * self.std))
        return images


INPUT: dict[str, Callable[..., Input]] = {"mpp": Input}


class Kept:
    """Checkpoints to be timed. A unit of work is a save, a resume or an export of a model of `sizes` and its optimizer.

    No images are read.
    """

    def __init__(self, size: str, folder: str) -> None:
        self.step = _step("mpp late, 1 block, a third")(size, "small", "fp32")
        self.encoder = self.step.model.get_submodule("encoder.model")
        self.origin = trained_by(recipe(SIZES[size]))
        self.folder = Path(folder) / "mpp"
        self.facts: dict[str, Any] = {}


class Save(Kept):
    """Saving as a run does it: atomic, synced and checksummed."""

    def run(self, times: int) -> int:
        for number in range(times):
            checkpoint.save(self.folder, number, self.step.model, self.step.optimizer, {}, keep=1)
        return times


class Resume(Kept):
    """Resuming, including the comparison of checksums."""

    def run(self, times: int) -> int:
        if not checkpoints_in(self.folder):
            checkpoint.save(self.folder, 0, self.step.model, self.step.optimizer, {}, keep=1)
        for _ in range(times):
            found = checkpoint.newest(self.folder)
            assert found is not None
            checkpoint.load(found, self.step.model, self.step.optimizer)
        return times


class Export(Kept):
    """Exporting. Plain timm loads the export in a clean process, and the outputs are compared."""

    def run(self, times: int) -> int:
        for _ in range(times):
            out = self.folder / "encoder"
            shutil.rmtree(out, ignore_errors=True)
            export_model(self.encoder, out, self.origin)
        return times


class Evaluate(Kept):
    """kNN of the last block's features as in `mpp evaluate`, including the writing of results."""

    def __init__(self, size: str, folder: str) -> None:
        super().__init__(size, folder)
        train, val = labeled(Path(folder))
        shutil.rmtree(self.folder / "encoder", ignore_errors=True)
        export_model(self.encoder, self.folder / "encoder", self.origin)
        self.recipe = EvaluateRecipe.model_validate(
            {
                "job": "evaluate", "encoder": str(self.folder / "encoder"), "controls": False, "probes": ["knn"],
                "layers": [SIZES[size].depth], "out": str(self.folder / "evaluation"),
                "data": {"train": str(train), "val": str(val), "batch_size": EVALUATION_BATCH},
            }
        )  # fmt: skip

    def run(self, times: int) -> int:
        for _ in range(times):
            shutil.rmtree(self.recipe.out, ignore_errors=True)
            evaluate(self.recipe)
        return times


class Embed:
    """Vectors of a folder of images by `mpp.embed`. A unit of work is a pass over all images."""

    def __init__(self, encoder: str, folder: str, images: str) -> None:
        chosen = EMBEDDERS[encoder]
        given = PretrainRecipe.model_validate(
            {
                "job": "pretrain", "out": "unused", "data": {"shards": "unused", "image_size": chosen.image_px},
                "encoder": {"name": chosen.name, "args": chosen.args}, "corruption": {"name": "pixel_patch"},
                "optim": {"steps": 1},
            }
        )  # fmt: skip
        self.encoder, self.images = Path(folder) / f"embed-{encoder}", images
        model, _ = build_model(given)
        export_model(model.encoder.model, self.encoder, trained_by(given))
        self.facts: dict[str, Any] = {}

    def run(self, times: int) -> int:
        found = [mpp.embed(str(self.encoder), [self.images], batch_size=EMBEDDED_BATCH) for _ in range(times)]
        return sum(len(embedded.vectors) for embedded in found)


EMBED: dict[str, Callable[..., Embed]] = {"mpp": Embed}

KEEP: dict[str, Callable[..., Kept]] = {
    "mpp: save": Save,
    "mpp: resume": Resume,
    "mpp: export": Export,
    "mpp: evaluate": Evaluate,
}
