"""Refuse a fine-tuning run that cannot work, before its folder is made and its first trial is trained."""

from __future__ import annotations

from pathlib import Path

from mpp.data.readers import LabeledImages
from mpp.data.subsets import split
from mpp.errors import UserError
from mpp.finetuning import lora
from mpp.finetuning.approaches import approaches_of, named_after, recipe_of_approach
from mpp.finetuning.head_start import check_head
from mpp.finetuning.label_kind import LabelKind
from mpp.finetuning.micro_loss import make_distillation
from mpp.finetuning.model import build
from mpp.finetuning.trial import parse_folder
from mpp.parallel.team import Team
from mpp.recipe.finetune import FinetuneRecipe
from mpp.training.exchange import accumulation


def check_run(recipe: FinetuneRecipe, team: Team, kind: LabelKind, train: LabeledImages, val: LabeledImages) -> None:
    """Check images, batch sizes, augmentation and models.

    Raises:
        UserError: If the run cannot work.
    """
    _check_images(recipe, kind, train, val)
    optim = recipe.optim
    micro_batches = accumulation(optim.global_batch_size, team.world, optim.max_batch_per_device)
    on_device = optim.global_batch_size // team.world // micro_batches
    if (recipe.mixup > 0 or recipe.cutmix > 0) and on_device % 2:
        raise UserError(f"mixup: needs an even number of images on a device; got {on_device}")
    kind.check_augmentation()
    # Build each model and discard it, because unsupported settings of an encoder are only detected when it is built.
    first_approach = approaches_of(recipe)[0]
    for approach in approaches_of(recipe):
        of_approach = recipe_of_approach(recipe, approach)
        with named_after(approach, recipe):
            model = build(of_approach, approach, recipe.seeds[0], len(train.classes))
            if of_approach.head_init == "probe":
                check_head(model)
            if of_approach.distill and approach == first_approach:  # all have the same teacher
                make_distillation(of_approach, team, model, train.classes)
            if of_approach.lora:
                lora.add(model.encoder, **of_approach.lora.model_dump())


def doubt_teacher(recipe: FinetuneRecipe) -> list[str]:
    """Return a warning for each teacher that was trained on other labels than its students.

    If the recipe trains on a part of the labels, each seed draws another part.
    """
    drawn = recipe.data.labels_per_class is not None or recipe.data.fraction is not None
    if recipe.distill is None or not drawn:
        return []
    doubts = []
    for teacher in recipe.distill.teacher:
        trial = parse_folder(Path(teacher))
        others = [seed for seed in recipe.seeds if trial and seed != trial.seed]
        if trial and others:
            seeds = ", ".join(map(str, others))
            doubts.append(
                f"distill.teacher: {teacher} learned from the labels that seed {trial.seed} draws; seed {seeds} draws "
                f"others, and learns from both. For a fair comparison give seeds=[{trial.seed}]"
            )
    return doubts


def _check_images(recipe: FinetuneRecipe, kind: LabelKind, train: LabeledImages, val: LabeledImages) -> None:
    if len(val) == 0:
        raise UserError(f"data.val: no images in {', '.join(recipe.data.val)}")
    if len(train.classes) < kind.least_classes:
        raise UserError(
            f"data.train: only one class ({', '.join(train.classes) or 'none'}); at least two are needed"
            + kind.hint_of_one_class(train)
        )
    for count in recipe.data.label_counts():
        subset = train.subset(labels_per_class=count, fraction=recipe.data.fraction, seed=recipe.seeds[0])
        if recipe.early_stop and not len(split(train.strata[subset], recipe.early_stop.fraction, 0)[1]):
            raise UserError("early_stop: needs a class with at least two training images")
