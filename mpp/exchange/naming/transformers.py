"""Names of weights in Hugging Face transformers: ViT, ViT-MAE, DeiT, BEiT, Swin and PVT v2.

The first template of a rule has the names in files, which releases 4 and 5 write and read. If there is a second
template, it has the names of modules in release 5.
"""

import re
from dataclasses import dataclass

from mpp.exchange.naming_rules import Rule, Trained, rule
from mpp.recipe.flat import JsonMapping, JsonObject
from mpp.recipe.values import TimmArgs


def _block(timm: str, file: str, module: str, attention: str) -> tuple[Rule, ...]:
    """Return the rules for the weights of a transformer block.

    Args:
        timm: Regular expression for the prefix of the block in timm.
        file: Prefix of the block in files.
        module: Prefix of the block in modules.
        attention: Name of the inner part of the attention in files.
    """
    inner, last = f"{file}.attention.{attention}", f"{{{file.count('{')}}}"  # the group after those of the prefix
    return (
        rule(
            timm + r"attn\.qkv\.(.+)",
            " ".join(f"{inner}.{part}.{last}" for part in ("query", "key", "value")),
            " ".join(f"{module}.attention.{part}_proj.{last}" for part in "qkv"),
        ),
        rule(timm + r"attn\.q_bias", f"{inner}.query.bias", f"{module}.attention.q_proj.bias"),
        rule(timm + r"attn\.v_bias", f"{inner}.value.bias", f"{module}.attention.v_proj.bias"),
        rule(timm + r"attn\.proj\.(.+)", f"{file}.attention.output.dense.{last}", f"{module}.attention.o_proj.{last}"),
        rule(timm + r"norm1\.(.+)", f"{file}.layernorm_before.{last}", f"{module}.layernorm_before.{last}"),
        rule(timm + r"norm2\.(.+)", f"{file}.layernorm_after.{last}", f"{module}.layernorm_after.{last}"),
        rule(timm + r"mlp\.fc1\.(.+)", f"{file}.intermediate.dense.{last}", f"{module}.mlp.fc1.{last}"),
        rule(timm + r"mlp\.fc2\.(.+)", f"{file}.output.dense.{last}", f"{module}.mlp.fc2.{last}"),
        rule(timm + r"gamma_([12])", f"{file}.lambda_{last}", f"{module}.lambda_{last}"),
        rule(
            timm + r"attn\.(relative_position_bias_table)",
            *([f"{inner}.{last}"] if attention == "self" else [f"{inner}.relative_position_bias.{last}"]),
            f"{module}.attention.relative_position_bias.{last}",
            f"{module}.relative_position_bias.{last}",
        ),
    )


def _stage_before(match: re.Match[str]) -> str:
    return f"encoder.layers.{int(match[1]) - 1}.downsample.{match[2]}"


TRAINED = (Trained("MAE", (r"(^|\.)decoder\.decoder_embed\.weight$",), masked=True),)
VIT = (
    rule(r"cls_token", "embeddings.cls_token"),
    rule(r"dist_token", "embeddings.distillation_token"),
    rule(r"pos_embed", "embeddings.position_embeddings"),
    rule(r"patch_embed\.proj\.(.+)", "embeddings.patch_embeddings.projection.{0}"),
    *_block(r"blocks\.(\d+)\.", "encoder.layer.{0}", "layers.{0}", "attention"),
    rule(r"norm\.(.+)", "layernorm.{0}"),
    rule(r"fc_norm\.(.+)", "pooler.layernorm.{0}"),
)
"""Rules for ViT, ViT-MAE, DeiT and BEiT. In BEiT the norm of the mean token belongs to the pooler."""

STAGE = "encoder.layers.{0}.blocks.{1}"
SWIN = (
    rule(r"patch_embed\.proj\.(.+)", "embeddings.patch_embeddings.projection.{0}"),
    rule(r"patch_embed\.norm\.(.+)", "embeddings.norm.{0}"),
    *_block(r"layers\.(\d+)\.blocks\.(\d+)\.", STAGE, STAGE, "self"),
    rule(r"layers\.(\d+)\.downsample\.(.+)", _stage_before),
    rule(r"norm\.(.+)", "layernorm.{0}"),
)

_PVT = r"stages\.(\d+)\.blocks\.(\d+)\."
PVT_V2 = (
    rule(r"patch_embed\.proj\.(.+)", "encoder.layers.0.patch_embedding.proj.{0}"),
    rule(r"patch_embed\.norm\.(.+)", "encoder.layers.0.patch_embedding.layer_norm.{0}"),
    rule(r"stages\.(\d+)\.downsample\.proj\.(.+)", "encoder.layers.{0}.patch_embedding.proj.{1}"),
    rule(r"stages\.(\d+)\.downsample\.norm\.(.+)", "encoder.layers.{0}.patch_embedding.layer_norm.{1}"),
    rule(_PVT + r"norm([12])\.(.+)", STAGE + ".layer_norm_{2}.{3}"),
    rule(_PVT + r"attn\.q\.(.+)", STAGE + ".attention.query.{2}"),
    rule(_PVT + r"attn\.kv\.(.+)", f"{STAGE}.attention.key.{{2}} {STAGE}.attention.value.{{2}}"),
    rule(_PVT + r"attn\.proj\.(.+)", STAGE + ".attention.proj.{2}"),
    rule(_PVT + r"attn\.sr\.(.+)", STAGE + ".attention.spatial_reduction.{2}"),
    rule(_PVT + r"attn\.norm\.(.+)", STAGE + ".attention.layer_norm.{2}"),
    rule(_PVT + r"mlp\.fc([12])\.(.+)", STAGE + ".mlp.dense{2}.{3}"),
    rule(_PVT + r"mlp\.dwconv\.(.+)", STAGE + ".mlp.dwconv.dwconv.{2}"),
    rule(r"stages\.(\d+)\.norm\.(.+)", "encoder.layers.{0}.layer_norm.{1}"),
)
RULES = (*VIT, *SWIN, *PVT_V2)

SIZES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
"""timm's word for a size, by (width, depth, heads)."""
ACTIVATIONS = {"gelu": None, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""timm's name of an activation by its name in transformers. None means the default of timm's model."""


@dataclass(frozen=True)
class Architecture:
    """A model that a config.json of transformers describes, as name and arguments of timm."""

    name: str
    args: TimmArgs
    """All arguments that follow from config.json."""
    defaults: JsonObject
    """Defaults of these arguments in the timm model of this name."""
    norm_eps: float

    @property
    def own(self) -> JsonObject:
        """Arguments that differ from the defaults of the name."""
        return {key: value for key, value in self.args.items() if value != self.defaults.get(key)}


def architecture(config: JsonMapping) -> Architecture:
    """Describe a model of transformers as a timm model. Keys that config.json lacks have transformers' defaults.

    Raises:
        Exception: ValueError, KeyError or TypeError, if timm has no such model.
    """
    kind, act = config["model_type"], config.get("hidden_act", "gelu")
    if kind not in MODELS:
        raise ValueError(f"model_type: expected one of {', '.join(MODELS)}; got '{kind}'")
    allowed = ACTIVATIONS if kind in ("vit", "vit_mae", "deit") else {"gelu": None}  # timm's others only have GELU
    if act not in allowed:
        raise ValueError(f"hidden_act: expected one of {', '.join(allowed)}; got '{act}'")
    name, args, defaults = MODELS[kind](config)
    if allowed[act]:
        args["act_layer"] = allowed[act]
    eps = config.get("layer_norm_eps", {"swin": 1e-5, "pvt_v2": 1e-6}.get(kind, 1e-12))
    return Architecture(name, args, defaults, float(eps))


Described = tuple[str, JsonObject, JsonObject]
"""Name of a timm model, its arguments, and the defaults of these arguments."""


def _vit(config: JsonMapping) -> Described:
    kind, width = config["model_type"], config.get("hidden_size", 768)
    shape = {
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
    }
    names = {"deit": "deit_{}_distilled_patch16_224", "beit": "beit_{}_patch16_224"}
    sizes = {"deit": ("tiny", "small", "base"), "beit": ("base", "large")}.get(kind, SIZES.values())
    size = SIZES.get(tuple(shape.values()))
    size = size if size in sizes else "base"
    named = next(numbers for numbers, word in SIZES.items() if word == size)
    args = shape | {
        "patch_size": config.get("patch_size", 16),
        "mlp_ratio": _ratio(config.get("intermediate_size", 3072), width),
        "qkv_bias": config.get("qkv_bias", True),
    }
    defaults: JsonObject = dict(zip(shape, named, strict=True)) | {
        "patch_size": 16,
        "mlp_ratio": 4,
        "qkv_bias": True,
    }
    if kind == "beit":
        for key, wanted in (
            ("use_relative_position_bias", True),
            ("use_shared_relative_position_bias", False),
            ("use_absolute_position_embeddings", False),
        ):
            if bool(config.get(key, False)) != wanted:
                raise ValueError(
                    f"{key}: must be {str(wanted).lower()}: timm's BEiTs have a bias of their own in each block"
                )
        args |= {
            "init_values": config.get("layer_scale_init_value", 0.1),
            "global_pool": "avg" if config.get("use_mean_pooling", True) else "token",
        }
        defaults |= {"init_values": 0.1 if size == "base" else 1e-5, "global_pool": "avg"}
    return names.get(kind, "vit_{}_patch16_224").format(size), args, defaults


def _ratio(hidden: int, width: int) -> float:
    """Return the MLP ratio for a hidden size. timm rounds width × ratio down, so the ratio must not be rounded down."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _swin(config: JsonMapping) -> Described:
    if config.get("use_absolute_embeddings"):
        raise ValueError("use_absolute_embeddings: must be false: timm's Swins have relative positions alone")
    defaults = {
        "patch_size": 4,
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
    }
    return "swin_tiny_patch4_window7_224", {key: config.get(key, value) for key, value in defaults.items()}, defaults


def _pvt_v2(config: JsonMapping) -> Described:
    for key, timm_values in (("patch_sizes", [7, 3, 3, 3]), ("strides", [4, 2, 2, 2])):
        if list(config.get(key, timm_values)) != timm_values:
            raise ValueError(f"{key}: {config[key]}: timm's PVTs have {timm_values}")
    theirs = {"embed_dims": "hidden_sizes", "num_heads": "num_attention_heads", "linear": "linear_attention"}
    defaults = {
        "depths": [2, 2, 2, 2],
        "embed_dims": [32, 64, 160, 256],
        "num_heads": [1, 2, 5, 8],
        "sr_ratios": [8, 4, 2, 1],
        "mlp_ratios": [8, 8, 4, 4],
        "linear": False,
        "qkv_bias": True,
    }
    return "pvt_v2_b0", {key: config.get(theirs.get(key, key), value) for key, value in defaults.items()}, defaults


MODELS = {"vit": _vit, "vit_mae": _vit, "deit": _vit, "beit": _vit, "swin": _swin, "pvt_v2": _pvt_v2}
"""Function that describes a configuration, by its model_type."""
