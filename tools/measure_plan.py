"""Measure the memory of a recipe's step on this CPU, and compare it with `mpp plan`.

    python tools/measure_plan.py recipes/pretrain/mae_vit_b16.yaml encoder.grad_checkpointing=true

The process makes two steps of 32 images in fp32. Its peak memory is measured, less its memory before the model was
built. glibc is told to return freed memory (MALLOC_TRIM_THRESHOLD_=0), because a GPU's allocator reuses it.
"""

from __future__ import annotations

import gc
import os
import sys

import torch

from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.planning.plan import plan
from mpp.recipe.loading import load_recipe
from mpp.recipe.overrides import parse_overrides
from mpp.recipe.pretrain import PretrainRecipe
from mpp.training.optimizer import make_optimizer, pretrain_groups

IMAGES = 32
FIXED = {
    "data.shards": "not opened",
    "precision": "fp32",
    "optim.global_batch_size": IMAGES,
    "optim.max_batch_per_device": IMAGES,
}


def memory_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))


def main(words: list[str]) -> None:
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != "0":  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"})
    recipe = load_recipe(words[0], PretrainRecipe, {**FIXED, **parse_overrides(tuple(words[1:]))})
    planned = plan(recipe, images=1_281_167, device="a100")
    gc.collect()
    before = memory_bytes("VmRSS")
    model, grid = build_model(recipe)
    model.train()
    groups = pretrain_groups(model, recipe.optim.weight_decay)
    optim = recipe.optim
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder.model)
    images = torch.zeros(IMAGES, recipe.data.channels, *recipe.data.image_size, dtype=torch.uint8)
    for _ in range(2):
        units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(IMAGES), recipe.masks_per_image)
        model(images, units).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = memory_bytes("VmHWM") - before
    print(f"{' '.join(words)}: planned {planned.device_bytes / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
