"""The encoder as a verified artifact: a timm folder that plain timm loads, and the proof that it does.

config.json  model.safetensors     what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads
reference.safetensors              two images and their features, written by this process
export.json                        checksum of the weights, tolerance, metrics
head.safetensors                   where a task predicts at every place: its head, which timm has no place for
recipe.yaml  README.md             how it was made, a model card
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mpp import faults
from mpp.encoders.timm_encoder import create_at_size, create_timm_model
from mpp.errors import MppWarning, UserError, one_line, reason, without_secrets
from mpp.metrics import environment
from mpp.recipe import DECODING, Architecture, FinetuneRecipe, ImageData, PretrainRecipe, dump_recipe
from mpp.records import encoder_folder, timm_folder, write_json
from mpp.verifying import HEAD, TOLERANCE, Verified, check_head, sha256, verified_at, verify, weights_sha256

Data = TypeVar("Data", bound=ImageData)
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
"""Keys of timm's pretrained_cfg that speak of other weights than these."""


@dataclass(frozen=True)
class Artifact:
    """What other formats than timm's are written from."""

    source: Path
    """The timm folder."""
    timm: Any
    """Its model."""
    model: nn.Module
    """(B, C, H, W) normalised -> outputs by name: features, embedding, logits of a classifier; or logits of pixels."""
    outputs: tuple[str, ...]
    config: dict[str, Any]
    """timm's config.json."""
    classes: list[str] | None
    reference: dict[str, torch.Tensor]
    """Two images, and the outputs that the folder states for them."""
    tolerance: float
    task: str | None
    """Of a fine-tuned model; multilabel: logits are of each class by itself."""
    value_range: Any
    """What counted as 0 and 1 in images that were not read as 8 bit; None for those that were."""

    def reading_line(self) -> str:
        """The line of a card that takes what is wanted of the outputs `found`, a dictionary."""
        if "logits" in self.outputs:
            return 'logits = found["logits"]'
        if "embedding" in self.outputs:
            return f'embedding = found["embedding"]  # (N, {self.config["num_features"]})'
        return f'embedding = found["features"][:, {self.timm.num_prefix_tokens}:].mean(1)'

    def described(self) -> dict[str, str]:
        """What a file that stands alone says of itself."""
        cfg = self.config["pretrained_cfg"]
        said = {key: json.dumps(cfg[key]) for key in ("input_size", "mean", "std")}
        said |= {"mean_and_std_of": pixels_of(self.value_range)} | ({"task": self.task} if self.task else {})
        return said | ({"classes": json.dumps(self.classes)} if self.classes else {})


@dataclass(frozen=True)
class Origin:
    """What an encoder is made for, and how it came to be."""

    mean: Sequence[float]
    """Of pixels in [0, 1], by channel; with std what its images are normalised with."""
    std: Sequence[float]
    input_size: tuple[int, int, int]
    """(channels, H, W), in pixels."""
    made: str
    """A sentence of its model card; limits: another."""
    limits: str
    crop_fraction: float = 1.0
    """Of the image's shorter side that is read."""
    recipe: str | None = None
    """The file recipe.yaml; None where there was none."""
    pixels: str = "pixels in [0, 1]"
    """What mean and std speak of."""


def pool_patches(model: Any) -> None:
    """Let a timm model give the mean of its patch tokens for an image, if it gives the class token or attention's pool.

    Pretraining trains the patch tokens. What it makes of the class token depends on the objective, and nothing trains
    the attention that some encoders (SigLIP, Perception Encoder) pool with. timm's distilled DeiTs pool in one way
    only: they stay as they are, see `has_embedding`.
    """
    if getattr(model, "global_pool", None) in ("token", "map") and hasattr(model, "reset_classifier"):
        with suppress(AssertionError):
            model.reset_classifier(0, "avg")


def has_embedding(model: Any) -> bool:
    """Whether what a timm model gives for an image is worth reading: not the class token of a distilled DeiT without
    a classifier, which reads two tokens that nobody trained."""
    return bool(model.num_classes) or type(model).__name__ != "VisionTransformerDistilled"


def reading_line(model: Any) -> str:
    """The line of a card that makes an embedding or logits of images with a timm model."""
    if model.num_classes:
        return "logits = model.eval()(images)"
    if has_embedding(model):
        return "embedding = model.eval()(images)"
    return f"embedding = model.eval().forward_features(images)[:, {model.num_prefix_tokens}:].mean(1)"


def trained_by(recipe: PretrainRecipe | FinetuneRecipe) -> Origin:
    """Of what this recipe trained."""
    if isinstance(recipe, PretrainRecipe):
        made = (
            f"Masked-patch pretraining without labels: mask {recipe.mask.name}, corruption {recipe.corruption.name}, "
            f"target {recipe.target.name}, head {recipe.head.name}, data `{', '.join(recipe.data.shards)}`."
        )
        limits = (
            "The final norm was not trained, and a class token's own output only by decoders that read it: fine-tune, "
            "or read the mean of the patch tokens, which is the embedding. `mpp finetune` tells how good the features "
            "are, compared with the same from scratch."
        )
    else:
        made = f"Fine-tuned on `{', '.join(recipe.data.train)}` from `{recipe.encoder}`."
        limits = "Judged on the validation data named in recipe.yaml alone."
    mean, std = recipe.data.mean_std()
    return Origin(
        mean=mean,
        std=std,
        input_size=(recipe.data.channels, *recipe.data.image_size),
        made=f"{made} The whole recipe is in `recipe.yaml`.",
        limits=limits,
        crop_fraction=getattr(recipe.data, "val_crop_fraction", 1.0),
        recipe=dump_recipe(recipe),
        pixels=pixels_of(recipe.data.decoding().get("value_range")),
    )


def stored_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in an encoder's folder, as it stands there; nothing for one made elsewhere."""
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        return values if isinstance(values, dict) and isinstance(values["data"], dict) else {}
    except (OSError, yaml.YAMLError, KeyError):
        return {}


def value_range_of(recipe: dict[str, Any], channels: int) -> Any:
    """How images were read that were not read as 8 bit: two numbers, or "type"; None for those that were."""
    stated = recipe.get("data", {}).get("value_range")
    return tuple(stated) if stated else None if channels in (1, 3, 4) else "type"


def pixels_of(value_range: Any) -> str:
    """What mean and std speak of, of images that were read so; None: as 8 bit."""
    if value_range is None:
        return "pixels in [0, 1]"
    words = "0 and the largest number of their type" if value_range == "type" else str(list(value_range))
    return f"values scaled to [0, 1] from {words}"


def save_encoder(
    model: nn.Module,
    folder: Path,
    origin: Origin,
    metrics: dict[str, Any],
    classes: list[str] | None = None,
    head: tuple[dict[str, torch.Tensor], list[str]] | None = None,
) -> None:
    """Write a timm model as a timm folder with its proof. An earlier export of the same folder is replaced.

    classes: of the model's own classifier. head: weights and classes of a head that timm does not know, for
    `load_head`. UserError where it cannot be written.
    """
    aside = folder.with_name(folder.name + ".tmp")
    training = model.training
    model.eval()
    try:
        shutil.rmtree(aside, ignore_errors=True)
        timm.models.save_for_hf(
            model,
            str(aside),
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
        config = json.loads((aside / "config.json").read_text())
        # transformers' TimmWrapper passes num_classes itself and fails on a second one
        config.get("model_args", {}).pop("num_classes", None)
        for key in NOT_INHERITED:
            config["pretrained_cfg"].pop(key, None)
        config["pretrained_cfg"] |= {"tag": "mpp", "license": "unknown"}
        write_json(aside / "config.json", config)
        device = next(model.parameters()).device
        images = torch.randn(2, *origin.input_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = model.forward_features(images.to(device))  # type: ignore[operator]
            reference = {"features": features}
            if has_embedding(model):
                reference["embedding"] = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
            if classes:
                reference["logits"] = model(images.to(device))
        save_file(
            # some families give the same memory twice, which safetensors refuses
            {"images": images, **{k: v.float().cpu().contiguous().clone() for k, v in reference.items()}},
            aside / "reference.safetensors",
        )
        written = ["model.safetensors", "reference.safetensors"]
        if head is not None:
            state = {name: value.cpu().contiguous() for name, value in head[0].items()}
            save_file(state, aside / HEAD, {"classes": json.dumps(head[1])})
            written.append(HEAD)
        for tensors in written:  # safetensors writes for the owner alone
            shutil.copymode(aside / "config.json", aside / tensors)
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
        (aside / "README.md").write_text(
            without_secrets(
                _card(
                    config,
                    origin,
                    metrics,
                    sum(p.numel() for p in model.parameters()),
                    use=reading_line(model),
                )
            )
        )
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


def load_head(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights and classes of the head that was saved beside an encoder. UserError where it is missing or damaged."""
    classes = check_head(folder)
    return load_file(folder / HEAD), classes


def load_encoder(source: str | Path, *, pretrained: bool = True, **timm_args: Any) -> nn.Module:
    """A plain timm model from a run or an export; `timm_args` such as num_classes, img_size.

    pretrained: with its weights. UserError where it is damaged or does not take the arguments.
    """
    folder = encoder_folder(source)
    if pretrained:
        weights_sha256(folder)
    try:
        return create_at_size(
            f"local-dir:{folder}", timm_args.pop("img_size", None), pretrained=pretrained, **timm_args
        )
    except Exception as error:  # timm, torch or safetensors, by whatever argument or byte is off
        raise UserError(f"{folder}: {type(error).__name__}: {one_line(error)}") from error


def is_timm_name(source: str) -> bool:
    """A folder comes before a model of the same name."""
    return not Path(source).exists() and timm.is_model(source.split(".")[0])


def check_source(source: str, *, key: str, more: tuple[str, ...] = ()) -> None:
    """UserError where `source` is neither a folder, nor one of timm's names, nor one of these `more` words."""
    if source in more or Path(source).exists() or is_timm_name(source):
        return
    close = difflib.get_close_matches(source, [*more, *timm.list_models()], 3, 0.6)
    hint = f". Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{key}: '{source}': no such folder, and no such model of timm {timm.__version__}{hint}")


def check_size(model: Any, size: tuple[int, int], what: str = "the encoder", *, key: str = "data.image_size") -> None:
    """UserError where cells of the model do not tile (H, W): timm would leave out the border in silence."""
    stride = model.feature_info[-1]["reduction"]
    if size[0] % stride or size[1] % stride:
        raise UserError(
            f"{key}: {what} has a stride of {stride} px; got {size[0]}×{size[1]}, allowed are multiples of {stride}"
        )


def fingerprint(train: str, val: str, *sources: str | None) -> str:
    """Of what something is trained and judged on: fingerprints of labeled images, and weights of these encoders.

    Names of timm's, "scratch" and None add nothing.
    """
    digest = hashlib.sha256((train + val).encode())
    for source in sources:
        if source and source != "scratch" and not is_timm_name(source):
            digest.update(weights_sha256(encoder_folder(source)).encode())
    return digest.hexdigest()


def class_names(folder: Path) -> list[str] | None:
    """Names of the classes that a fine-tuned model tells apart, in its order; None where nobody wrote them down."""
    found = json.loads((folder / "config.json").read_text()).get("label_names")
    return [str(name) for name in found] if found else None


def own_normalisation(source: str, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation, of pixels in [0, 1], that an encoder was trained with; None where nobody knows."""
    if source == "scratch":
        return None
    config: Any = timm.get_pretrained_cfg(source) if is_timm_name(source) else None
    if config is not None:
        return for_channels(config.mean, channels), for_channels(config.std, channels)
    try:
        stored = json.loads((encoder_folder(source) / "config.json").read_text())["pretrained_cfg"]
        return for_channels(stored["mean"], channels), for_channels(stored["std"], channels)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_as(source: str, data: Data, *, warn: bool) -> Data:
    """Fill in how an encoder's images were read, where a recipe does not say it: channels, formats,
    max_image_pixels, value_range, nodata.

    Args:
        source: The encoder, as a recipe names it.
        warn: Say it if the recipe gives other channels than the encoder has.

    Raises:
        UserError: The recipe's keys do not go together with what is filled in.
    """
    folder = timm_folder(source)
    stored = stored_recipe(folder).get("data", {}) if folder else {}
    filled: dict[str, Any] = {}
    own = _channels(folder) if folder else None
    if own is not None and own != data.channels:
        if "channels" not in data.model_fields_set:
            filled["channels"] = own
        elif warn:
            warnings.warn(
                f"data.channels: {data.channels}, but the encoder was trained with {own}: its first layer is summed up "
                f"or repeated. Left out, {own} is taken",
                MppWarning,
                stacklevel=4,
            )
    if "max_image_pixels" not in data.model_fields_set and stored.get("max_image_pixels"):
        filled["max_image_pixels"] = max(stored["max_image_pixels"], data.max_image_pixels)
    if "formats" not in data.model_fields_set:
        filled["formats"] = _all_formats(stored)
    if own in (None, filled.get("channels", data.channels)):  # ranges of other channels are of other images
        for key in ("value_range", "nodata"):
            if stored.get(key) is not None and getattr(data, key) is None:
                filled[key] = tuple(stored[key]) if isinstance(stored[key], list) else stored[key]
    found = data.model_copy(update=filled)
    for key in ("mean", "std"):
        values = getattr(found, key)
        if values is not None and len(values) != found.channels:
            raise UserError(f"data.{key}: has {len(values)} values; the encoder has {found.channels} channels")
    found.check_nodata()
    return found


def _all_formats(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Formats of images: those that are read unless a recipe says otherwise, and those of a stored recipe."""
    return tuple(dict.fromkeys((*DECODING["formats"], *stored.get("formats", ()))))


def _channels(folder: Path) -> int | None:
    """Of the images that the encoder in a timm folder takes; None if it does not say."""
    try:
        found = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"][0]
        return found if type(found) is int and found > 0 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def decoding_of(folder: Path, channels: int) -> dict[str, Any]:
    """How the images of the run that made a timm folder were read, as `decode_crop` takes it."""
    stored = stored_recipe(folder)
    data = stored.get("data", {})
    found: dict[str, Any] = {"channels": channels, "formats": _all_formats(data)}
    found["max_image_pixels"] = max(data.get("max_image_pixels", 0), DECODING["max_image_pixels"])
    value_range = value_range_of(stored, channels)
    return found if value_range is None else found | {"value_range": value_range, "nodata": data.get("nodata")}


def normalised_as(source: str, data: Data, *, warn: bool) -> Data:
    """Fill in all that an encoder's images were read and normalised with, where a recipe does not say it: what
    `read_as` fills in, mean and std. A warning if the recipe gives other values than the encoder's."""
    data = read_as(source, data, warn=warn)
    own = own_normalisation(source, data.channels)
    if own is None:
        return data
    for key, value in zip(("mean", "std"), own, strict=True):
        given = getattr(data, key)
        if warn and given is not None and list(given) != value:
            shown = ", ".join(f"{v:g}" for v in value)
            warnings.warn(
                f"data.{key}: the encoder was trained with [{shown}]; left out, that is taken", MppWarning, stacklevel=4
            )
    mean, std = (tuple(getattr(data, k) or v) for k, v in zip(("mean", "std"), own, strict=True))
    return data.model_copy(update={"mean": mean, "std": std})


def for_channels(values: Sequence[float], channels: int) -> list[float]:
    """Of other channels than its own timm sums or repeats the first layer's weights: they share the mean of these."""
    found = [float(v) for v in values]
    return found if len(found) == channels else [sum(found) / len(found)] * channels


def open_encoder(
    source: str,
    *,
    architecture: Architecture | None,
    image_size: tuple[int, int] | None,
    channels: int | None,
    pretrained: bool,
    **timm_args: Any,
) -> Any:
    """A timm model without classifier from a run, an export or a name of timm's.

    architecture: arguments of the model, and its name if `source` is "scratch". image_size: (H, W), channels; None: its
    own. pretrained: with weights. UserError where it cannot be had so.
    """
    given = architecture or Architecture()
    if source != "scratch" and given.name is not None:
        raise UserError(f"architecture.name: only with encoder: scratch; {source} has its own")
    if source == "scratch" or is_timm_name(source):
        return create_timm_model(
            given.name or source,
            image_size=image_size,
            in_chans=channels or 3,
            pretrained=pretrained,
            args={**timm_args, **given.args},
            key="architecture.name" if source == "scratch" else "encoder",
            args_key="architecture.args",
        )
    asked: Any = {"img_size": image_size, "in_chans": channels}
    asked = {key: value for key, value in asked.items() if value}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in given.args.items()}
    if reserved := sorted({*asked, "num_classes", "pretrained"} & own.keys()):
        raise UserError(
            f"architecture.args.{reserved[0]}: is not for a recipe to set here; see data.image_size, data.channels"
        )
    return load_encoder(source, pretrained=pretrained, num_classes=0, **asked, **{**timm_args, **own})


def export_model(model: nn.Module, out: str | Path, origin: Origin) -> Verified:
    """Write a timm model to `out` and verify it there. UserError where `out` is not new or empty."""
    return verified_at(Path(out), lambda folder: save_encoder(model, folder, origin, {}), verify)


def _card(config: dict[str, Any], origin: Origin, metrics: dict[str, Any], parameters: int, use: str) -> str:
    """use: the line that makes an embedding or logits of images."""
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
