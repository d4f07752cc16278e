"""Measure the memory of a recipe's step, and compare it with `mpp plan`.

    python tools/measure_plan.py recipes/pretrain/mae_vit_b16.yaml encoder.grad_checkpointing=true

The process makes two steps of 32 images in fp32 on this CPU. Its peak memory is measured, less its memory before the
model was built. glibc is told to return freed memory (MALLOC_TRIM_THRESHOLD_=0), because a GPU's allocator reuses it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.planning.plan import plan
from mpp.recipe.loading import load_recipe
from mpp.recipe.overrides import parse_overrides
from mpp.recipe.pretrain import PretrainRecipe
from mpp.training.optimizer import make_optimizer, pretrain_groups

IMAGES = 32


def memory_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))


def planned_and_measured(
    name: str, images: int, changes: Sequence[str], device: torch.device, precision: str
) -> tuple[int, int]:
    """Return the bytes of a step as planned for a GPU, and as measured in two steps on a device.

    Args:
        name: Name or path of a recipe of pretraining.
        images: Images of a step.
        changes: Changes to the recipe, such as "mask=block".
        device: Where the steps are made. On a CPU, all memory of the process counts that it did not have before.
        precision: "fp32" or "bf16".
    """
    fixed: dict[str, Any] = {"data.shards": "not opened", "precision": precision}
    fixed |= {"optim.global_batch_size": images, "optim.max_batch_per_device": images}
    recipe = load_recipe(name, PretrainRecipe, {**fixed, **parse_overrides(tuple(changes))})
    planned = plan(recipe, images=1_281_167, device="a100")
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else memory_bytes("VmRSS")
    model, grid = build_model(recipe)
    model.to(device).train()
    groups = pretrain_groups(model, recipe.optim.weight_decay)
    optim = recipe.optim
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder.model)
    pixels = torch.zeros(images, recipe.data.channels, *recipe.data.image_size, dtype=torch.uint8, device=device)
    for _ in range(2):
        units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(images), recipe.masks_per_image)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(pixels, units.tensors_by(lambda t: t.to(device)))
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return planned.device_bytes, (torch.cuda.max_memory_allocated() if cuda else memory_bytes("VmHWM")) - before


def main(words: list[str]) -> None:
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != "0":  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"})
    planned, measured = planned_and_measured(words[0], IMAGES, words[1:], torch.device("cpu"), "fp32")
    print(f"{' '.join(words)}: planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
