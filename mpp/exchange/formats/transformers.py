"""Write a folder that transformers' Auto classes load, with an image processor.

ViT, DeiT, BEiT, Swin and PVT v2 become transformers' own models if a trial shows that these compute the same. All
others are timm's folder, read by transformers' TimmWrapper. So are classifiers that pool differently than
transformers' own.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpp.encoders.timm_model import TimmModel
from mpp.exchange.artifact import Artifact
from mpp.exchange.naming import transformers as layout
from mpp.exchange.naming_rules import renamed
from mpp.recipe.flat import JsonObject

EXTRA, NEEDS = "transformers", ("transformers",)

USE = """
from transformers import AutoImageProcessor, AUTO

model = AUTO.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
outputs = model(**processor(images, return_tensors="pt"))
OUTPUT
"""
WITHOUT_PROCESSOR = """
from transformers import AUTO

model = AUTO.from_pretrained("FOLDER")
outputs = model(images)  # (N, channels, H, W) float32, normalised as below
OUTPUT
"""
EMBEDDINGS = {
    "pooler": "outputs.pooler_output",
    "patches": "outputs.last_hidden_state[:, PREFIX:].mean(1)",
    "map": "outputs.last_hidden_state.mean((2, 3))",
}
"""Expressions that give the embedding of an image. `embedding` in config.json names one of them, by default pooler."""


def use(artifact: Artifact, folder: Path) -> str:
    """Return the usage example of the model card.

    It uses an image processor if the folder has one and the encoder was trained on 8-bit images with 3 channels.
    """
    auto = "AutoModelForImageClassification" if artifact.classes else "AutoModel"
    text = USE if has_processor(folder) and _of_photographs(artifact) else WITHOUT_PROCESSOR
    return text.replace("AUTO", auto).replace("OUTPUT", _output(artifact, folder))


def _output(artifact: Artifact, folder: Path) -> str:
    """Return the line of the usage example that reads the result."""
    if artifact.classes:
        return "logits = outputs.logits"
    if "embedding" not in artifact.outputs:
        return f"embedding = outputs.last_hidden_state[:, {artifact.timm.num_prefix_tokens}:].mean(1)"
    where = EMBEDDINGS[json.loads((folder / "config.json").read_text()).get("embedding", "pooler")]
    return f"embedding = {where}".replace("PREFIX", str(getattr(artifact.timm, "num_prefix_tokens", 0)))


def has_processor(folder: Path) -> bool:
    """Return whether a folder has an image processor: a file of its own, or the one that TimmWrapper makes."""
    config = json.loads((folder / "config.json").read_text())
    return (folder / "preprocessor_config.json").exists() or "architecture" in config


def _of_photographs(artifact: Artifact) -> bool:
    return artifact.config["pretrained_cfg"]["input_size"][0] == 3 and artifact.value_range is None


def write(artifact: Artifact, folder: Path) -> str:
    """Write config.json, model.safetensors and, if images have three channels, preprocessor_config.json.

    Returns:
        Which kind of model was written, for the model card.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    described = _described(artifact.timm) if "features" in artifact.outputs else None
    if described is not None and _written(transformers, described, artifact, folder):
        _write_processor(artifact, folder)
        return f"transformers' own {described['architectures'][0]}"
    config = dict(artifact.config)
    if artifact.task == "multilabel":
        config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(artifact.source / "model.safetensors", folder / "model.safetensors")
    return "timm's model, through TimmWrapper"


def _written(transformers: object, config: JsonObject, artifact: Artifact, folder: Path) -> bool:
    """Write transformers' own model into `folder`. Return whether it takes every weight and computes the same."""
    base, kind = config.pop("class"), config["model_type"]
    state = dict(artifact.timm.state_dict())
    prefix, heads = "", {}
    if artifact.classes:
        named = {n: v for n, v in state.items() if n.startswith(("head.", "head_dist."))}
        state = {n: v for n, v in state.items() if n not in named}
        prefix = f"{kind}."
        words = {"head.": "cls_classifier.", "head_dist.": "distillation_classifier."} if kind == "deit" else {}
        for name, value in named.items():
            first = "head_dist." if name.startswith("head_dist.") else "head."
            heads[words.get(first, "classifier.") + name.rpartition(".")[2]] = value
        config["id2label"] = {str(i): name for i, name in enumerate(artifact.classes)}
        if len(set(artifact.classes)) == len(artifact.classes):
            config["label2id"] = {name: i for i, name in enumerate(artifact.classes)}
        base = base.replace("Model", "ForImageClassification" + ("WithTeacher" if kind == "deit" else ""))
        if artifact.task == "multilabel":
            config["problem_type"] = "multi_label_classification"
    theirs, left = renamed(state, config.pop("rules"))
    if left:
        return False
    written: dict[str, Tensor] = {prefix + name: value for name, value in theirs.items()} | heads
    if not artifact.classes and "pooler_act" in config:
        width = config["hidden_size"]  # an identity: the pooler returns the class token unchanged
        written |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    config["architectures"] = [base]
    # The poolers of ViT and DeiT return the class token. So does that of BEiT without use_mean_pooling.
    pools_patches = getattr(artifact.timm, "global_pool", None) != "token"
    if kind == "pvt_v2":
        config["embedding"] = "map"
    elif pools_patches and (kind in ("vit", "deit") or not config.get("use_mean_pooling", True)):
        config |= {"embedding": "patches", "prefix_tokens": artifact.timm.num_prefix_tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {name: value.contiguous().clone() for name, value in written.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    try:
        with warnings.catch_warnings(action="ignore"):
            model, loading = getattr(transformers, base).from_pretrained(folder, output_loading_info=True)
            same = not any(loading.values()) and _same(model.eval(), artifact)
    except Exception:  # transformers raises many kinds of errors for shapes, keys and values that it does not support
        same = False
    return same


@torch.no_grad()
def _same(model: TimmModel, artifact: Artifact) -> bool:
    """Return whether the model gives the reference features or logits, and the embedding if its pooler returns that."""
    out, reference = model(artifact.reference["images"]), artifact.reference
    key = "logits" if artifact.classes else "features"
    outputs = {key: out.logits if artifact.classes else out.last_hidden_state}
    if not artifact.classes and "embedding" in reference and not hasattr(model.config, "embedding"):
        outputs["embedding"] = out.pooler_output
    return all(
        bool(
            (value.reshape(reference[k].shape) - reference[k]).abs().max()
            <= artifact.tolerance * reference[k].abs().max()
        )
        for k, value in outputs.items()
    )


def _described(model: TimmModel) -> JsonObject | None:
    """Return config.json of transformers' model of the same kind, with `class` and `rules`. None if there is none.

    Properties of the model that config.json leaves out are not checked here. `_written` detects them, because a model
    with other parts does not fit or computes something else.
    """
    family, common = type(model).__name__, {"num_channels": model.in_chans if hasattr(model, "in_chans") else 3}
    makers = {"VisionTransformer": _vit, "VisionTransformerDistilled": _vit, "Beit": _vit}
    makers |= {"SwinTransformer": _swin, "PyramidVisionTransformerV2": _pvt_v2}
    try:
        return common | makers[family](model) if family in makers else None
    except (AttributeError, TypeError, IndexError):  # a variant with other parts
        return None


def _side(size: Any) -> Any:
    height, width = size
    return height if height == width else [height, width]


def _vit(model: TimmModel) -> JsonObject:
    block, family = model.blocks[0], type(model).__name__
    kind, base = {"VisionTransformerDistilled": ("deit", "DeiTModel"), "Beit": ("beit", "BeitModel")}.get(
        family, ("vit", "ViTModel")
    )
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    config = {
        "class": base,
        "rules": layout.VIT,
        "model_type": kind,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": norm.eps,
        "image_size": _side(model.patch_embed.img_size),
        "patch_size": model.patch_embed.patch_size[0],
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "beit":
        config.pop("qkv_bias")  # BEiT's configuration has no such key
        return config | {
            "use_relative_position_bias": True,
            "use_mean_pooling": not isinstance(model.norm, nn.LayerNorm),
            "layer_scale_init_value": 0.1,
            "drop_path_rate": 0.0,
        }
    return config | {"pooler_act": "linear", "pooler_output_size": model.embed_dim}


def _swin(model: TimmModel) -> JsonObject:
    blocks = [stage.blocks for stage in model.layers]
    return {
        "class": "SwinModel",
        "rules": layout.SWIN,
        "model_type": "swin",
        "image_size": _side(model.patch_embed.img_size),
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depths": [len(b) for b in blocks],
        "num_heads": [b[0].attn.num_heads for b in blocks],
        "window_size": blocks[0][0].window_size[0],
        "mlp_ratio": blocks[0][0].mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": blocks[0][0].attn.qkv.bias is not None,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "drop_path_rate": 0.0,
    }


def _pvt_v2(model: TimmModel) -> JsonObject:
    blocks = [stage.blocks for stage in model.stages]
    widths = [b[0].norm1.normalized_shape[0] for b in blocks]
    return {
        "class": "PvtV2Model",
        "rules": layout.PVT_V2,
        "model_type": "pvt_v2",
        "depths": [len(b) for b in blocks],
        "hidden_sizes": widths,
        "num_attention_heads": [b[0].attn.num_heads for b in blocks],
        "sr_ratios": [getattr(getattr(b[0].attn, "sr", None), "stride", (1,))[0] for b in blocks],
        "mlp_ratios": [_whole(b[0].mlp.fc1.out_features / w) for b, w in zip(blocks, widths, strict=True)],
        "linear_attention": blocks[0][0].attn.pool is not None,
        "qkv_bias": blocks[0][0].attn.q.bias is not None,
        "hidden_act": "gelu",
        "layer_norm_eps": blocks[0][0].norm1.eps,
        "drop_path_rate": 0.0,
    }


def _whole(value: float) -> float:
    """Return an int if the value is one, as transformers requires."""
    return int(value) if value == int(value) else value


def _write_processor(artifact: Artifact, folder: Path) -> None:
    """Write an image processor that reads images as in evaluation: scale the shorter side, crop the centre, normalise.

    Nothing is written if images do not have 3 channels of 8 bit, or if the crop is not square: no image processor of
    transformers crops to another shape without stretching.
    """
    cfg = artifact.config["pretrained_cfg"]
    _, height, width = cfg["input_size"]
    if height != width or not _of_photographs(artifact):
        return
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": int(height / (cfg.get("crop_pct") or 1.0))},  # as timm rounds it
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": cfg["mean"],
        "image_std": cfg["std"],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


VERIFY = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
reference = load_file(folder + "/reference.safetensors")
config = json.load(open(folder + "/config.json"))
auto = transformers.AutoModelForImageClassification if "logits" in reference else transformers.AutoModel
model, loading = auto.from_pretrained(folder, output_loading_info=True)
wrong = {k: sorted(map(str, v))[:5] for k, v in loading.items() if v}
assert not wrong, "weights that do not fit: " + json.dumps(wrong)
images = reference["images"]
with torch.no_grad():
    out = model.eval()(images)
if "logits" in reference:
    found = {"logits": out.logits}
else:
    found = {"features": out.last_hidden_state.reshape(reference["features"].shape)}
    if "embedding" in reference:
        where, hidden = config.get("embedding", "pooler"), out.last_hidden_state
        if where == "pooler":
            found["embedding"] = out.pooler_output.reshape(reference["embedding"].shape)
        else:
            tokens = hidden[:, config["prefix_tokens"] :] if where == "patches" else hidden.flatten(2).mT
            found["embedding"] = tokens.mean(1)
runs = [(found, [0, 1])]
about = json.load(open(folder + "/export.json"))["normalisation"]
has_processor = os.path.exists(folder + "/preprocessor_config.json") or "architecture" in config
if has_processor and images.shape[1] == 3 and about["value_range"] is None:
    from PIL import Image
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    h, w = images.shape[2:]
    # wider than it is high for its shape, and of the scale that needs no resizing: a crop from its centre is left
    tall = int(h / (about["crop_pct"] or 1.0))
    wide = round(tall * w / h) + 6
    y, x = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    pixels = torch.stack([(7 * y + 3 * x) % 251, (5 * y + 11 * x) % 241, (13 * y + x) % 239]).to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    got = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    top, left = (tall - h) // 2, (wide - w) // 2
    mean, std = (torch.tensor(about[k]).view(3, 1, 1) for k in ("mean", "std"))
    wanted = (pixels[:, top : top + h, left : left + w] / 255 - mean) / std
    assert got.shape == wanted.shape, f"the image processor gives {tuple(got.shape)}"
    reference["processed"] = wanted[None]
    runs.append(({"processed": got[None]}, [0]))
"""
