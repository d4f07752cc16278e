"""Encoder families that the contract tests cover, each with a tiny configuration, and the results of the tests.

A family that is not listed is probed like any other (`probing.py`). It can be trained if its probe and its leak check
pass. `mpp models --check NAME` runs the whole contract on it.

To add a family, add a line to FAMILIES. Then run `python tools/support_table.py`, which writes support.json and the
table of docs/encoders.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mpp.recipe.flat import JsonObject
from mpp.recipe.values import TimmArgs
from mpp.runs.verdict import aligned

FAMILIES_THAT_DROP = frozenset({"VisionTransformer", "VisionTransformerDistilled", "Eva"})
"""Class names of models whose blocks take any subset of tokens. Their positions are absolute and added before block 0,
or rotary and passed to each block. BEiT and rel-pos ViTs have biases between all pairs of positions. Other families
have windows, strides or mixing over a fixed number of positions."""


@dataclass(frozen=True)
class Family:
    """One row of the support table."""

    title: str
    family: str
    """Class name of the timm model."""
    models: str
    """Patterns of the names of timm models, to be shown to users."""
    example: str
    """Name of the timm model that the tests build, with `args` at `image_size`."""
    args: TimmArgs
    image_size: tuple[int, int]


_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
_SWIN = {"patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2}
_CONV_ATTENTION = {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": (8, 8)}

FAMILIES = (
    Family("ViT (Ti, S, B, L, H)", "VisionTransformer", "vit_*", "vit_tiny_patch16_224", _VIT, (12, 20)),
    Family("ViT-g, G", "VisionTransformer", "vit_giant_*, vit_gigantic_*", "vit_giant_patch14_224", _VIT, (12, 20)),
    Family("ViT-g, SwiGLU", "VisionTransformer", "vit_giant_*_dinov2", "vit_giant_patch14_dinov2", _VIT, (12, 20)),
    Family("ViT, average-pooled", "VisionTransformer", "vit_*_gap_*", "vit_base_patch16_gap_224", _VIT, (12, 20)),
    Family(
        "ViT with registers", "VisionTransformer", "vit_*_reg4_*", "vit_small_patch14_reg4_dinov2", _VIT, (12, 20)
    ),
    Family("ViT, norm before", "VisionTransformer", "vit_*_clip_*", "vit_base_patch16_clip_224", _VIT, (12, 20)),
    Family(
        "ResNet-ViT, small stem", "VisionTransformer", "vit_tiny_r_*", "vit_tiny_r_s16_p8_224",
        {"embed_dim": 24, "depth": 2, "num_heads": 2}, (64, 96),
    ),
    Family(
        "ResNet-ViT, R26", "VisionTransformer", "vit_*_r26_*", "vit_small_r26_s32_224",
        {"embed_dim": 24, "depth": 2, "num_heads": 2}, (64, 96),
    ),
    Family(
        "ResNet-ViT, R50", "VisionTransformer", "vit_*_r50_*", "vit_base_r50_s16_224",
        {"embed_dim": 24, "depth": 2, "num_heads": 2}, (48, 80),
    ),
    Family("DeiT", "VisionTransformer", "deit_*", "deit_tiny_patch16_224", _VIT, (12, 20)),
    Family(
        "DeiT, distilled", "VisionTransformerDistilled", "deit_*_distilled_*", "deit_tiny_distilled_patch16_224",
        _VIT, (12, 20),
    ),
    Family("DeiT III", "VisionTransformer", "deit3_*", "deit3_small_patch16_224", _VIT, (12, 20)),
    Family("EVA-02", "Eva", "eva02_*", "eva02_tiny_patch14_224", _VIT, (12, 20)),
    Family("RoPE ViT, axial", "Eva", "vit_*_rope_*", "vit_small_patch16_rope_224", _VIT, (12, 20)),
    Family(
        "RoPE ViT, mixed", "Eva", "vit_*_rope_mixed_*", "vit_small_patch16_rope_mixed_ape_224", _VIT, (12, 20)
    ),
    Family("DINOv3 ViT", "Eva", "vit_*_dinov3*", "vit_small_patch16_dinov3", _VIT, (12, 20)),
    Family("BEiT", "Beit", "beit_*, beitv2_*", "beit_base_patch16_224", _VIT, (12, 20)),
    Family("Swin", "SwinTransformer", "swin_*", "swin_tiny_patch4_window7_224", _SWIN, (12, 20)),
    Family("SwinV2", "SwinTransformerV2", "swinv2_*", "swinv2_tiny_window8_256", _SWIN, (12, 20)),
    Family("MLP-Mixer", "MlpMixer", "mixer_*, gmixer_*, resmlp_*, gmlp_*", "mixer_s32_224", {}, (64, 96)),
    Family("CoAtNet", "MaxxVit", "coatnet_*", "coatnet_nano_rw_224", _CONV_ATTENTION, (64, 96)),
    Family(
        "MaxViT", "MaxxVit", "maxvit_*", "maxvit_pico_rw_256",
        {**_CONV_ATTENTION, "transformer_window_size": (2, 2), "transformer_grid_size": (2, 2)}, (64, 128),
    ),
    Family(
        "PVT v2", "PyramidVisionTransformerV2", "pvt_v2_*", "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}, (64, 96),
    ),
    Family(
        "ConvNeXt V2", "ConvNeXt", "convnextv2_*, convnext_*", "convnextv2_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, (64, 96),
    ),
    Family(
        "ResNet", "ResNet", "resnet*, resnext*, wide_resnet*, seresnet*", "resnet18",
        {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}, (64, 96),
    ),
    Family(
        "Hiera", "Hiera", "hiera_*", "hiera_tiny_224",
        {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "mask_unit_attn": (True, False, False, False)},
        (64, 96),
    ),
)  # fmt: skip

TRIED = frozenset(f.family for f in FAMILIES)
"""Class names of the timm models that the contract tests cover."""
TABLE = Path(__file__).with_name("support.json")


def table() -> list[JsonObject]:
    """Return the results of the contract tests, one row per family, in the order of FAMILIES."""
    rows: list[JsonObject] = json.loads(TABLE.read_text())
    return rows


COLUMNS = ("family", "timm models", "stem", "mask tokens", "pixel patch", "drop, join late")


def support_rows(rows: list[JsonObject] | None = None) -> list[tuple[str, ...]]:
    """Return the support table as words: one tuple per family, with the columns of COLUMNS."""
    return [
        (
            row["title"],
            row["models"],
            " or ".join(stem.split(" ")[0] for stem in row["stem"]) or "none",
            *(_verdict(row["ways"], ways) for ways in (["token"], ["pixel"], ["drop", "joining"])),
        )
        for row in rows or table()
    ]


def _verdict(faults_of: dict[str, list[str]], ways: list[str]) -> str:
    offered = [way for way in ways if way in faults_of]
    if not offered:
        return "no"
    return "fails" if any(faults_of[way] for way in offered) else "yes"


def markdown(rows: list[JsonObject] | None = None) -> str:
    """Return the support table for docs/encoders.md."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for title, models, stem, *verdicts in support_rows(rows):
        code = (" or ".join(f"`{word}`" for word in stem.split(" or ")), *verdicts)
        lines.append((title, ", ".join(f"`{word}`" for word in models.split(", ")), *code))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text() -> str:
    """Return the support table for a terminal."""
    return "\n".join(aligned([COLUMNS, *support_rows()], gap=2))
