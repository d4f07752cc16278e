"""Models for fine-tuning: a timm encoder and the head of a task, built from a recipe and saved as a timm folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpp.encoders.checksums import HEAD
from mpp.encoders.folder import save_encoder, trained_by
from mpp.encoders.maps import probe_maps, read_maps
from mpp.encoders.sources import check_size, load_encoder, load_head, open_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.finetuning.task import Task
from mpp.recipe import registry
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonObject
from mpp.rng import Purpose, torch_seed
from mpp.runs.records import encoder_folder


class Supervised(nn.Module):
    """Base of the models of all tasks: `encoder`, `task`, and the normalisation of images."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, task: Task, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.encoder: TimmModel = encoder
        self.task: Any = task
        self.distilled: nn.Module | None = None
        """Head on the distillation token, if the encoder has one and learns from a teacher."""
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images: (B, C, H, W) in [0, 255] -> float32."""
        return (images.float() - self.mean) / self.std

    def run(self, images: Tensor) -> Any:
        """Return the outputs for images (B, C, H, W) in [0, 255] on any device."""
        return self(self.normalise(images.to(self.mean.device)))


class Classifier(Supervised):
    """The pooled encoder and the head of a task, with an optional second head on the distillation token."""

    def __init__(
        self,
        encoder: nn.Module,
        task: Task,
        mean: list[float],
        std: list[float],
        distilled: nn.Module | None = None,
    ) -> None:
        super().__init__(encoder, task, mean, std)
        self.distilled = distilled

    def forward(self, x: Tensor, targets: object = None) -> Tensor | tuple[Tensor, Tensor]:
        """Compute logits: (B, C, H, W) normalised -> (B, classes).

        With a distillation head, return the logits of both heads in training, and their mean otherwise.
        """
        if self.distilled is None:
            return self.task(self.encoder(x))
        tokens = self.encoder.forward_features(x)
        first, second = self.task(tokens[:, 0]), self.distilled(tokens[:, 1])
        return (first, second) if self.training else (first + second) / 2


class Dense(Supervised):
    """An encoder and a task that predicts at every place, from the feature maps of the blocks `indices`."""

    def __init__(self, encoder: nn.Module, task: Task, mean: list[float], std: list[float], indices: list[int]) -> None:
        super().__init__(encoder, task, mean, std)
        self.indices = indices

    def forward(self, x: Tensor, targets: object = None) -> Any:
        """Return the outputs of the task for images (B, C, H, W), normalised. Only training uses `targets`."""
        size = (x.shape[-2], x.shape[-1])
        return self.task(read_maps(self.encoder, x, self.indices), size, targets if self.training else None)


def over_views(run: Callable[[Tensor], Tensor], crops: Tensor, *, mirrored: bool, independent: bool) -> Tensor:
    """Average the predictions over several crops of each image and their mirror images.

    Args:
        run: Model that maps (n, C, H, W) in [0, 255] to (n, classes) logits.
        crops: Crops of each image, (B, crops, C, H, W) in [0, 255].
        mirrored: Whether mirror images also count.
        independent: Whether classes are independent (sigmoid), because an image may have several.

    Returns:
        (B, classes) float32 probabilities.
    """

    def probable(images: Tensor) -> Tensor:
        logits = run(images).float()
        return logits.sigmoid() if independent else logits.softmax(-1)

    flat = crops.flatten(0, 1)
    probabilities = probable(flat)
    if mirrored:
        probabilities = (probabilities + probable(flat.flip(-1))) / 2
    return probabilities.unflatten(0, (len(crops), -1)).mean(1)


def is_dense(recipe: FinetuneRecipe) -> bool:
    """Return whether the task predicts at every place."""
    kind = registry.component("labels", registry.component("task", recipe.task.name).labels)
    return bool(kind.at_every_place)


def build(recipe: FinetuneRecipe, approach: str, seed: int, num_classes: int) -> Supervised:
    """Make the model of a trial, initialised from its seed.

    Args:
        recipe: Recipe of the approach, see `recipe_of_approach`.
        approach: Name of the approach. For "scratch" and "cnn" the encoder starts with random weights.
        seed: Seed of the trial.
        num_classes: Number of classes.

    Raises:
        UserError: If the encoder does not support the recipe.
    """
    torch.manual_seed(torch_seed(seed, Purpose.INIT))
    encoder = _encoder(recipe, pretrained=approach not in ("scratch", "cnn"), pool=None)
    if is_dense(recipe):
        return _dense(recipe, encoder, num_classes)
    wanted = {"mean": "avg", "token": "token", "attention": "map"}[recipe.pool]
    if wanted == "map" and not hasattr(encoder, "attn_pool"):
        raise UserError(f"pool: attention: timm's {type(encoder).__name__} has no attention pooling; use pool=mean")
    if wanted == "token" and getattr(encoder, "num_prefix_tokens", 0) == 0:
        raise UserError(f"pool: token: {type(encoder).__name__} has no class token here; use pool=mean")
    if wanted == "avg" and type(encoder).__name__ == "VisionTransformerDistilled":
        raise UserError("pool: mean: timm's distilled DeiTs read their class and distillation tokens; use pool=token")
    encoder = _pooled(recipe, encoder, wanted, seed)
    check_size(encoder, recipe.data.image_size)
    width = _width(encoder, recipe)
    task = registry.build("task", recipe.task, width, num_classes)
    distilled = None
    if recipe.distill and type(encoder).__name__ == "VisionTransformerDistilled":
        distilled = registry.build("task", recipe.task, width, num_classes)
    return Classifier(encoder, task, *recipe.data.mean_std(), distilled)


def _pooled(recipe: FinetuneRecipe, encoder: TimmModel, wanted: str, seed: int) -> TimmModel:
    """Return the encoder with timm's pooling `wanted` and the norm before or after it, as in the recipe.

    If the pooling changes, timm silently drops the weights of the final norm. So the weights are copied here. A norm in
    a new place starts with new weights.

    Raises:
        UserError: If the encoder has no such norm, or if its other weights depend on the pooling.
    """
    takes = inspect.signature(type(encoder).__init__).parameters
    key = next((key for key in ("fc_norm", "use_fc_norm") if key in takes), None)
    if recipe.fc_norm is not None and key is None:
        raise UserError(f"fc_norm: timm's {type(encoder).__name__} has its norm in one place; leave out fc_norm")
    norms_after = key is not None and not isinstance(encoder.fc_norm, nn.Identity)
    norm_after = recipe.fc_norm if recipe.fc_norm is not None else norms_after and wanted == "avg"
    pooling = getattr(encoder, "global_pool", wanted)
    # in convolutional families `global_pool` is a layer that pools the feature map
    if (pooling == wanted or not isinstance(pooling, str)) and norm_after == norms_after:
        return encoder
    torch.manual_seed(torch_seed(seed, Purpose.INIT))
    built = _encoder(recipe, pretrained=False, pool={"global_pool": wanted, **({key: norm_after} if key else {})})
    missing, extra = built.load_state_dict(encoder.state_dict(), strict=False)
    # attention pooling may be new here, or (SigLIP, Perception Encoder) be dropped because the recipe takes the mean
    strange = [name for name in missing if not name.startswith(("norm.", "fc_norm.", "attn_pool."))]
    strange += [name for name in extra if not name.startswith(("norm.", "fc_norm.", "attn_pool."))]
    if strange:
        raise UserError(
            f"pool: {recipe.pool}: {type(encoder).__name__} has other weights then: {', '.join(strange[:3])}"
        )
    return built


def _dense(recipe: FinetuneRecipe, encoder: TimmModel, num_classes: int) -> Dense:
    if getattr(encoder, "feature_info", None):
        check_size(encoder, recipe.data.image_size)
    indices, maps = probe_maps(encoder, recipe.data.image_size)
    task = registry.build("task", recipe.task, maps, num_classes)
    return Dense(encoder, task, *recipe.data.mean_std(), indices)


@torch.no_grad()
def _width(encoder: nn.Module, recipe: FinetuneRecipe) -> int:
    """Return the width of the encoder's feature vector, which some families widen after pooling.

    Raises:
        UserError: If the encoder does not run at this image size, or returns no vector.
    """
    blank = torch.zeros(1, recipe.data.channels, *recipe.data.image_size)
    try:
        features = encoder.eval()(blank)
    except Exception as error:  # timm's models raise different errors if a size or window does not fit
        words, size = one_line(error), "×".join(map(str, recipe.data.image_size))
        raise UserError(f"data.image_size: {type(encoder).__name__} does not run at {size} px: {words}") from error
    encoder.train()
    if features.ndim != 2:
        raise UserError(
            f"encoder: {type(encoder).__name__} gives {tuple(features.shape[1:])} for an image, not a vector"
        )
    return int(features.shape[1])


def _encoder(recipe: FinetuneRecipe, *, pretrained: bool, pool: JsonObject | None) -> TimmModel:
    return open_encoder(
        recipe.encoder,
        architecture=recipe.architecture,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        pretrained=pretrained,
        **({"drop_path_rate": recipe.drop_path_rate} if recipe.drop_path_rate else {}),
        **(pool or {}),
    )


def save(model: Supervised, trial: Path, recipe: FinetuneRecipe, metrics: dict[str, float], classes: list[str]) -> None:
    """Write the fine-tuned model as a timm folder.

    If timm's own classifier has the same linear layers, the classifier is saved as part of the encoder. The head of a
    task that predicts at every place is saved in a separate file.

    Args:
        model: Model to write.
        trial: Folder of the trial.
        recipe: Recipe of the approach.
        metrics: Metrics on the validation images.
        classes: Names of the classes.
    """
    encoder, folder, origin = model.encoder, trial / "encoder", trained_by(recipe)
    if isinstance(model, Dense):
        save_encoder(encoder, folder, origin, metrics, head=(model.task.state_dict(), classes))
        return
    tasks: list[Any] = [task for task in (model.task, model.distilled) if task is not None]
    if tasks[0].hidden is None and hasattr(encoder, "reset_classifier"):
        encoder.reset_classifier(len(classes))
        classifier = encoder.get_classifier()
        theirs = list(classifier) if isinstance(classifier, tuple) else [classifier]
        # timm averages the classifiers of both tokens: with the same weights in each, the result is the trained head
        tasks = tasks * len(theirs) if len(tasks) == 1 else tasks
        if len(theirs) == len(tasks) and all(isinstance(layer, nn.Linear) for layer in theirs):
            for layer, task in zip(theirs, tasks, strict=True):
                layer.load_state_dict(task.out.state_dict())
            encoder.to(tasks[0].out.weight.device)
            save_encoder(encoder, folder, origin, metrics, classes)
            return
        encoder.reset_classifier(0)
    save_encoder(encoder, folder, origin, metrics)


def load_dense(source: str | Path) -> tuple[Dense, FinetuneRecipe, list[str]]:
    """Load a fine-tuned model that predicts at every place, its recipe and its classes, from a trial or its export.

    Raises:
        UserError: If the folder is incomplete or damaged, or does not fit its recipe.
    """
    from mpp.recipe.loading import load_recipe

    folder = encoder_folder(source)
    recipe = load_recipe(folder / "recipe.yaml", FinetuneRecipe)
    encoder = load_encoder(folder, num_classes=0)
    state, classes = load_head(folder)
    model = _dense(recipe, encoder, len(classes))
    try:
        model.task.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder}/{HEAD}: does not fit its recipe: {one_line(error)}") from error
    return model.eval(), recipe, classes
