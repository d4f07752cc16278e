"""Build a model from a recipe. Parts that cannot work together are refused here, before any data is read."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import torch

from mpp.encoders.adapter import TimmEncoder, adapt
from mpp.encoders.creation import create_timm_model
from mpp.encoders.sources import load_encoder
from mpp.encoders.support import TRIED
from mpp.encoders.teacher import FrozenTeacher, frozen_copy, frozen_teacher
from mpp.encoders.timm_model import TimmModel
from mpp.errors import MppWarning, UserError
from mpp.objective import contract
from mpp.objective.agreement import Agreement
from mpp.objective.interfaces import Corruption, CorruptionContext, Mask, TargetContext
from mpp.objective.model import MaskedPatchModel, Objective
from mpp.objective.weight_init import init_as_mae
from mpp.recipe import registry
from mpp.recipe.pretrain import ExtraTarget, PretrainRecipe
from mpp.recipe.values import TimmArgs
from mpp.rng import Purpose, torch_seed
from mpp.training.optimizer import layer_numbers


def build_mask(recipe: PretrainRecipe) -> Mask:
    return registry.build("mask", recipe.mask)


def build_model(recipe: PretrainRecipe, mask: Mask | None = None) -> tuple[MaskedPatchModel, tuple[int, int]]:
    """Build the model and initialise it from the recipe's seed.

    Args:
        recipe: Resolved recipe.
        mask: Mask of the recipe. None means that it is built here.

    Returns:
        The model, and the grid of mask units (uh, uw).

    Raises:
        UserError: If parts of the recipe cannot work together. The message names the keys.
    """
    size, channels = recipe.data.image_size, recipe.data.channels
    _check_encoder_args(recipe.encoder.args)
    torch.manual_seed(torch_seed(recipe.seed, Purpose.INIT))
    timm_model = _timm_model(recipe)
    encoder = adapt(timm_model, size, recipe.mask.unit_px)
    unit = recipe.mask.unit_px or encoder.stride
    if unit % encoder.stride and encoder.stride % unit:
        raise UserError(
            f"mask.unit_px: must be a multiple of the encoder's stride, {encoder.stride} px, or divide it; got {unit}"
        )
    if size[0] % unit or size[1] % unit or size[0] * size[1] < 2 * unit * unit:
        raise UserError(
            f"data.image_size: must be multiples of the mask's unit, {unit} px, and at least two of them; "
            f"got {size[0]}×{size[1]}"
        )
    mask = mask or build_mask(recipe)
    stem_dim = encoder.stem.dim if encoder.stem else 0
    corruption = registry.build("corruption", recipe.corruption, CorruptionContext(stem_dim, channels, unit))
    _check_corruption(corruption, encoder, unit)
    has_batch_norms = any(name.endswith("running_var") for name, _ in encoder.named_buffers())
    if recipe.masks_per_image > 1 and has_batch_norms:
        raise UserError(
            f"masks_per_image: {encoder.family} has batch norms, whose statistics would show each mask what the "
            "other masks of the same image hide; use 1"
        )
    if recipe.agreement and has_batch_norms and recipe.encoder.grad_checkpointing:
        raise UserError(
            f"encoder.grad_checkpointing: {encoder.family} has batch norms, so each view of agreement has its own "
            "forward pass, and only the last one can be recomputed; use false"
        )
    objectives = _build_objectives(recipe, encoder, unit, corruption.hidden_enter)
    mean, std = recipe.data.mean_std()
    grid = (size[0] // unit, size[1] // unit)
    try:
        guide = mask.guide(partial(frozen_teacher, channels=channels, grid=grid, key="mask"))
    except ValueError as error:
        raise UserError(f"mask.{error}") from error
    try:
        model = MaskedPatchModel(
            encoder,
            corruption,
            objectives,
            unit_px=unit,
            predict_fraction=recipe.predict_fraction,
            guide=guide,
            mean=mean,
            std=std,
            agreement=Agreement(encoder.dim, **recipe.agreement.model_dump()) if recipe.agreement else None,
            # In one batch, the statistics of batch norms would show a view what other views of the image hide.
            views_apart=has_batch_norms,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if recipe.encoder.free_blocks is not None:
        _freeze(recipe, timm_model)
    if recipe.encoder.grad_checkpointing:  # after teachers are copied, which have no backward pass
        _checkpoint_activations(recipe, timm_model)
    if encoder.family not in TRIED:
        _try_now(model, recipe.encoder.name)
    return model, grid


def _timm_model(recipe: PretrainRecipe) -> TimmModel:
    """Return the timm model of the recipe, with random weights or with those to start from."""
    named, size, channels = recipe.encoder, recipe.data.image_size, recipe.data.channels
    if named.weight_init != "timm" and named.starts_trained:
        raise UserError(f"encoder.weight_init: {named.weight_init} is for random weights; these have been trained")
    if Path(named.name).is_dir():
        for key in named.args:
            if not key.endswith("drop_rate") and key != "drop_path_rate":
                raise UserError(
                    f"encoder.args.{key}: {named.name} is a folder, which has its own; only drop rates can be given. "
                    f"None of the recipe's are taken with encoder='{{name: {named.name}}}'"
                )
        return load_encoder(named.name, num_classes=0, img_size=size, in_chans=channels, **named.args)
    model: TimmModel = create_timm_model(
        named.name, image_size=size, in_chans=channels, pretrained=named.pretrained, args=named.args
    )
    if named.weight_init == "mae":
        stride = model.feature_info[-1]["reduction"]
        try:
            init_as_mae(model, (size[0] // stride, size[1] // stride))
        except ValueError as error:
            raise UserError(f"encoder.weight_init: {error}") from error
    return model


def _build_objectives(
    recipe: PretrainRecipe, encoder: TimmEncoder, unit_px: int, hidden_enter: bool
) -> list[Objective]:
    """Return the objectives of the main target and the extra targets, each with head, loss and weight.

    Raises:
        UserError: If a target, loss or head is wrong. The message names its key.
    """
    channels, cell_px = recipe.data.channels, min(unit_px, encoder.stride)
    parts = encoder.stride // cell_px
    grid = (recipe.data.image_size[0] // cell_px, recipe.data.image_size[1] // cell_px)

    def student(*, layers: int, norm_average: bool) -> FrozenTeacher:
        if parts > 1:
            raise ValueError(f"mask.unit_px: {unit_px} px is less than the encoder's stride, {encoder.stride} px")
        return frozen_copy(encoder, layers=layers, norm_average=norm_average)

    objectives: list[Objective] = []
    sections: list[tuple[str, PretrainRecipe | ExtraTarget, float]] = [("", recipe, 1.0)]
    sections += [(f"extra_targets.{i}.", extra, extra.weight) for i, extra in enumerate(recipe.extra_targets)]
    for where, section, weight in sections:
        teacher = partial(frozen_teacher, channels=channels, grid=grid, key=f"{where}target")
        context = TargetContext(channels, cell_px, grid, teacher, student)
        target = registry.build(f"{where}target", section.target, context)
        loss = registry.build(f"{where}loss", section.loss)
        # if mask units are smaller than the encoder's cells, each cell predicts all of its parts
        head = registry.build(f"{where}head", section.head, encoder.dim, target.dim * parts * parts, hidden_enter)
        name = section.target.name
        while name in {o.name for o in objectives}:
            name += "_"
        objectives.append(Objective(name, target, head, loss, weight, where))
    return objectives


def _try_now(model: MaskedPatchModel, name: str) -> None:
    """Run the leak check on a model whose family the contract tests do not cover, and warn about the family.

    Raises:
        UserError: If the leak check fails.
    """
    subject = contract.shaken(copy.deepcopy(model))
    try:
        for training in (False, True):
            contract.no_leak(subject, training=training)
    except Exception as error:  # Broken, or any error of an unknown family
        raise UserError(f"encoder.name: {name}: {model.encoder.family}s are not supported: {error}") from error
    warnings.warn(
        f"encoder.name: {name}: no contract test has seen a {model.encoder.family}; no leak was found just now; "
        f"`mpp models --check {name}` tries the rest",
        MppWarning,
        stacklevel=3,
    )


def _check_corruption(corruption: Corruption, encoder: TimmEncoder, unit: int) -> None:
    """Raise UserError if this encoder cannot do what the corruption needs."""
    enter, drops = corruption.enter, corruption.mechanism == "drop"
    by_dropping = drops or enter > 0
    key = "corruption.name: drop" if drops else f"corruption.enter: {enter}"
    pixel = registry.named_with("corruption", mechanism="pixel")
    if by_dropping and not encoder.drops:
        keeping = [n for n in registry.named_with("corruption", mechanism="token") if n != "token"]
        raise UserError(
            f"{key}: {encoder.family} cannot run on a part of its tokens (windows, strides, mixing or biases over "
            f"all places). Use corruption.name: token with enter: 0, or one of {', '.join(pixel + keeping)}"
        )
    if by_dropping and unit % encoder.stride:
        raise UserError(
            f"{key}: mask units must be multiples of the encoder's stride, {encoder.stride} px, to drop their "
            f"tokens; mask.unit_px is {unit}"
        )
    if corruption.mechanism == "token" and encoder.stem is None:
        if encoder.stems:
            strides = " or ".join(str(s.stride) for s in encoder.stems)
            raise UserError(
                f"mask.unit_px: mask tokens need a multiple of the stem's stride, {strides} px; got {unit}. "
                f"Or use corruption.name: {pixel[0]}"
            )
        raise UserError(
            f"corruption.name: {encoder.family} has no stem that takes mask tokens. Use one of {', '.join(pixel)}"
        )
    if enter >= encoder.depth > 0:
        raise UserError(
            f"corruption.enter: the encoder has blocks 0 to {encoder.depth - 1}; got {enter}. "
            "To keep mask tokens out of it altogether: corruption.name: drop"
        )


def _freeze(recipe: PretrainRecipe, model: TimmModel) -> None:
    """Freeze the embedding and all blocks except the last ones that the recipe leaves free."""
    free = recipe.encoder.free_blocks
    assert free is not None
    layers, depth = layer_numbers(model)
    # some families have blocks that pretraining does not use, such as those of class attention
    blocks = sorted(
        {layers[name] for name, p in model.named_parameters() if p.requires_grad} & set(range(1, depth + 1))
    )
    if free >= len(blocks):
        raise UserError(
            f"encoder.free_blocks: the encoder has {len(blocks)} blocks (or stages, where timm counts these); "
            "give fewer, or null to train all"
        )
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and layers[name] >= blocks[-free])


def _checkpoint_activations(recipe: PretrainRecipe, model: TimmModel) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise UserError(f"encoder.grad_checkpointing: timm's {recipe.encoder.name} has none; use false") from error


def _check_encoder_args(args: TimmArgs) -> None:
    """Refuse drop rates that timm would accept and fail on at the first batch, and dropping of patches.

    Hiding patches is the job of the mask.
    """
    if args.get("patch_drop_rate"):
        raise UserError("encoder.args.patch_drop_rate: hiding patches is the mask's part; use mask.ratio")
    for key, value in args.items():
        if key.endswith(("drop_rate", "drop_path_rate")) and not (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        ):
            raise UserError(f"encoder.args.{key}: must be >= 0 and < 1; got {value!r}")
