"""From a recipe to its parts. What cannot work together is refused here, before any data is read."""

from __future__ import annotations

from typing import Any

import torch

from mpp import registry
from mpp.encoders.support import TRIED
from mpp.encoders.timm_encoder import TimmEncoder, create_timm_model
from mpp.errors import UserError
from mpp.model import MaskedPatchModel
from mpp.recipe import PretrainRecipe, Section
from mpp.rng import Purpose, torch_seed
from mpp.types import MaskSampler

FOLDERS = {
    "mask": "masks",
    "corruption": "corruptions",
    "target": "targets",
    "loss": "losses",
    "head": "heads",
}
"""Recipe key -> folder of its components."""


def build_component(key: str, section: Section, *args: Any) -> Any:
    """The component that a recipe names: `args` from the toolkit, keywords from the recipe.

    UserError where its constructor refuses them.
    """
    chosen = section.model_dump()
    cls = registry.component(FOLDERS.get(key, "tasks"), chosen.pop("name"))
    try:
        return cls(*args, **chosen)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def build_mask(recipe: PretrainRecipe) -> MaskSampler:
    return build_component("mask", recipe.mask)


def build_model(recipe: PretrainRecipe) -> tuple[MaskedPatchModel, tuple[int, int]]:
    """The model, initialised from the recipe's seed, and the grid of mask units (gh, gw).

    UserError for every combination that cannot work, with the keys.
    """
    size = recipe.data.image_size
    _check_encoder_args(recipe.encoder.args)
    torch.manual_seed(torch_seed(recipe.seed, Purpose.INIT))
    timm_model = create_timm_model(
        recipe.encoder.name,
        image_size=size,
        in_chans=recipe.data.channels,
        pretrained=recipe.encoder.pretrained,
        args=recipe.encoder.args,
    )
    family = type(timm_model).__name__
    if family not in TRIED:
        tried = "; ".join(TRIED.values())
        raise UserError(f"encoder.name: {recipe.encoder.name} is a {family}, not tried yet. Allowed: {tried}")
    if getattr(timm_model, "attn_pool", None) is not None:
        raise UserError("encoder.args.global_pool: map has weights that pretraining would not train; use token or avg")
    if recipe.encoder.grad_checkpointing:
        timm_model.set_grad_checkpointing(True)  # type: ignore[operator]
    encoder = TimmEncoder(timm_model, size)
    unit = recipe.mask.unit_px or encoder.stride
    if unit % encoder.stride:
        raise UserError(f"mask.unit_px: must be a multiple of the encoder's stride, {encoder.stride} px; got {unit}")
    if size[0] % unit or size[1] % unit or size[0] * size[1] < 2 * unit * unit:
        raise UserError(
            f"data.image_size: must be multiples of the mask's unit, {unit} px, and at least two of them; "
            f"got {size[0]}×{size[1]}"
        )
    enter = getattr(recipe.corruption, "enter", 0)
    if enter >= encoder.depth > 0:
        raise UserError(
            f"corruption.enter: the encoder has blocks 0 to {encoder.depth - 1}; got {enter}. "
            "To keep mask tokens out of it altogether: corruption.name: drop"
        )
    corruption = build_component("corruption", recipe.corruption, encoder.stem_dim)
    target = build_component("target", recipe.target, recipe.data.channels, encoder.stride)
    head = build_component("head", recipe.head, encoder.dim, target.dim, corruption.hidden_enter)
    mean, std = recipe.data.mean_std()
    try:
        model = MaskedPatchModel(
            encoder,
            corruption,
            target,
            build_component("loss", recipe.loss),
            head,
            unit_px=unit,
            predict_fraction=recipe.predict_fraction,
            mean=mean,
            std=std,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return model, (size[0] // unit, size[1] // unit)


def _check_encoder_args(args: dict[str, Any]) -> None:
    """What timm would take and then fail on at the first batch, or what pretraining does itself."""
    if args.get("patch_drop_rate"):
        raise UserError("encoder.args.patch_drop_rate: hiding patches is the mask's part; use mask.ratio")
    for key, value in args.items():
        if key.endswith(("drop_rate", "drop_path_rate")) and not (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        ):
            raise UserError(f"encoder.args.{key}: must be >= 0 and < 1; got {value!r}")
