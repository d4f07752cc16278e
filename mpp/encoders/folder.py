"""Write an encoder as a timm folder, with a reference output that proves it loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from mpp.encoders.checksums import HEAD, TOLERANCE, sha256
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, reason, without_secrets
from mpp.parallel import faults
from mpp.recipe.dump import dump_recipe
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonObject
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.sections import ValueRange
from mpp.runs.environment import environment
from mpp.runs.records import write_json

NOT_INHERITED = (
    "hf_hub_id",
    "hf_hub_filename",
    "url",
    "file",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
    "license",
)
"""Keys of timm's pretrained_cfg that describe the published weights, not the exported ones."""


@dataclass(frozen=True)
class Origin:
    """Input that an encoder expects, and how its weights were made."""

    mean: Sequence[float]
    """Mean of each channel of the input, for values in [0, 1]."""
    std: Sequence[float]
    """Standard deviation of each channel of the input, for values in [0, 1]."""
    input_size: tuple[int, int, int]
    """(channels, H, W), in pixels."""
    made: str
    """How the weights were made, for the model card."""
    limits: str
    """Limitations of the weights, for the model card."""
    crop_fraction: float = 1.0
    """Fraction of the image's shorter side that is read."""
    recipe: str | None = None
    """Content of recipe.yaml. None if there is no recipe."""
    pixels: str = "pixels in [0, 1]"
    """The values that mean and std refer to, in words."""


def pool_patches(model: TimmModel) -> None:
    """Make a timm model that pools by class token or by attention return the mean of its patch tokens instead.

    Pretraining trains the patch tokens. Whether the class token is useful depends on the objective. The attention that
    some encoders (SigLIP, Perception Encoder) pool with is never trained. timm's distilled DeiTs support only one kind
    of pooling and are left unchanged, see `has_embedding`.
    """
    if getattr(model, "global_pool", None) in ("token", "map") and hasattr(model, "reset_classifier"):
        with suppress(AssertionError):
            model.reset_classifier(0, "avg")


def has_embedding(model: TimmModel) -> bool:
    """Return whether the pooled output of a timm model is useful.

    It is not for a distilled DeiT without a classifier, which pools two tokens that were not trained.
    """
    return bool(model.num_classes) or type(model).__name__ != "VisionTransformerDistilled"


def reading_line(model: TimmModel) -> str:
    """Return the line of the model card's example that computes embeddings or logits with a timm model."""
    if model.num_classes:
        return "logits = model.eval()(images)"
    if has_embedding(model):
        return "embedding = model.eval()(images)"
    return f"embedding = model.eval().forward_features(images)[:, {model.num_prefix_tokens}:].mean(1)"


def trained_by(recipe: PretrainRecipe | FinetuneRecipe) -> Origin:
    """Return the origin of an encoder that this recipe trained."""
    crop_fraction = 1.0
    if isinstance(recipe, PretrainRecipe):
        made = (
            f"Masked-patch pretraining without labels: mask {recipe.mask.name}, corruption {recipe.corruption.name}, "
            f"target {recipe.target.name}, head {recipe.head.name}, data `{', '.join(recipe.data.shards)}`."
        )
        if recipe.ema_decay:
            made += (
                f" The weights are a moving average with decay {recipe.ema_decay}. Loss and skill were measured with "
                "the weights of the last step."
            )
        limits = (
            "The final norm was not trained, and a class token's own output only by decoders that read it: fine-tune, "
            "or read the mean of the patch tokens, which is the embedding. `mpp finetune` tells how good the features "
            "are, compared with the same from scratch."
        )
    else:
        made = f"Fine-tuned on `{', '.join(recipe.data.train)}` from `{recipe.encoder}`."
        limits = "Judged on the validation data named in recipe.yaml alone."
        crop_fraction = recipe.data.val_crop_fraction
    mean, std = recipe.data.mean_std()
    return Origin(
        mean=mean,
        std=std,
        input_size=(recipe.data.channels, *recipe.data.image_size),
        made=f"{made} The whole recipe is in `recipe.yaml`.",
        limits=limits,
        crop_fraction=crop_fraction,
        recipe=dump_recipe(recipe),
        pixels=pixels_of(recipe.data.decoding().get("value_range")),
    )


def pixels_of(value_range: ValueRange | None) -> str:
    """Describe the values that mean and std refer to, for images read with this range. None means 8-bit images."""
    if value_range is None:
        return "pixels in [0, 1]"
    words = "0 and the largest number of their type" if value_range == "type" else str(list(value_range))
    return f"values scaled to [0, 1] from {words}"


def save_encoder(
    model: nn.Module,
    folder: Path,
    origin: Origin,
    metrics: JsonObject,
    classes: list[str] | None = None,
    head: tuple[dict[str, torch.Tensor], list[str]] | None = None,
) -> None:
    """Write a timm model as a timm folder, with a reference output to verify it.

    Args:
        model: timm model to write.
        folder: Folder to write. An earlier export in it is replaced.
        origin: Input that the model expects, and how its weights were made.
        metrics: Metrics for the model card and export.json.
        classes: Class names of the model's own classifier.
        head: Weights and class names of a head that timm cannot store. `load_head` reads it.

    Raises:
        UserError: If the folder cannot be written.
    """
    aside = folder.with_name(folder.name + ".tmp")
    training = model.training
    model.eval()
    model.to(memory_format=torch.contiguous_format)  # files support no other
    try:
        shutil.rmtree(aside, ignore_errors=True)
        config = _write_timm_files(model, aside, origin, classes)
        _write_reference(model, aside, origin, classes)
        if head is not None:
            state = {name: value.cpu().contiguous() for name, value in head[0].items()}
            save_file(state, aside / HEAD, {"classes": json.dumps(head[1])})
        for tensors in aside.glob("*.safetensors"):  # safetensors makes its files readable only by the owner
            shutil.copymode(aside / "config.json", tensors)
        if origin.recipe is not None:
            (aside / "recipe.yaml").write_text(origin.recipe, encoding="utf-8")
        write_json(
            aside / "export.json",
            {
                "weights_sha256": sha256(aside / "model.safetensors"),
                "files_sha256": {name: sha256(aside / name) for name in ("config.json", "reference.safetensors")},
                **({"head_sha256": sha256(aside / HEAD)} if head is not None else {}),
                "tolerance": TOLERANCE,
                "metrics": metrics,
                "environment": environment()["packages"],
            },
        )
        parameters = sum(p.numel() for p in model.parameters())
        card = _card(config, origin, metrics, parameters, use=reading_line(model))
        (aside / "README.md").write_text(without_secrets(card))
        faults.point("export.written", aside / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        faults.point("export.before_rename")
        os.replace(aside, folder)
        faults.point("export.renamed")
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written: {reason(error)}") from error
    finally:
        model.train(training)


def _write_timm_files(model: nn.Module, folder: Path, origin: Origin, classes: list[str] | None) -> JsonObject:
    """Write config.json and model.safetensors as timm reads them, and return the configuration."""
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": classes} if classes else None,
        safe_serialization=True,
        data_config={
            "mean": list(origin.mean),
            "std": list(origin.std),
            "input_size": origin.input_size,
            "crop_pct": origin.crop_fraction,
            "interpolation": "bicubic",
        },
    )
    config: JsonObject = json.loads((folder / "config.json").read_text())
    # transformers' TimmWrapper passes num_classes itself and fails on a second one
    config.get("model_args", {}).pop("num_classes", None)
    for key in NOT_INHERITED:
        config["pretrained_cfg"].pop(key, None)
    config["pretrained_cfg"] |= {"tag": "mpp", "license": "unknown"}
    write_json(folder / "config.json", config)
    return config


def _write_reference(model: TimmModel, folder: Path, origin: Origin, classes: list[str] | None) -> None:
    """Write two random images and the model's outputs, for comparison when the folder is loaded."""
    device = next(model.parameters()).device
    images = torch.randn(2, *origin.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_features(images.to(device))
        reference = {"features": features}
        if has_embedding(model):
            reference["embedding"] = model.forward_head(features, pre_logits=True)
        if classes:
            reference["logits"] = model(images.to(device))
    save_file(
        # in some families two outputs share memory, which safetensors refuses
        {"images": images, **{k: v.float().cpu().contiguous().clone() for k, v in reference.items()}},
        folder / "reference.safetensors",
    )


def _card(config: JsonObject, origin: Origin, metrics: JsonObject, parameters: int, use: str) -> str:
    """Return the text of the model card. `use` is the line of its example that computes embeddings or logits."""
    width = config.get("num_classes") or config["num_features"]
    how = f"{use}  # (N, {width}); images (N, channels, height, width), normalised as below\n"
    kind = "classification" if config.get("num_classes") else "feature-extraction"
    cfg = config["pretrained_cfg"]
    rows = [f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in metrics.items()]
    values = "\n".join(["## Metrics", "", "| | |", "|---|---|", *rows]) + "\n\n" if rows else ""
    return f"""---
library_name: timm
tags: [image-{kind}]
---
# {config["architecture"]}, {parameters / 1e6:.2f} M parameters

{origin.made}

## Use

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True)
{how}```

## Input

{cfg["input_size"]} (channels, height, width), mean {cfg["mean"]}, std {cfg["std"]} of {origin.pixels}.
Pooling: {config.get("global_pool", "none")}.

{values}## Limits

{origin.limits}

`mpp verify FOLDER` loads it in a clean process and compares what it gives with `reference.safetensors`.
"""
