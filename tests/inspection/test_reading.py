"""Attention is read where it is computed, and reading it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.encoders.creation import create_timm_model
from mpp.encoders.support import FAMILIES, Family
from mpp.inspection.measures import places
from mpp.inspection.reading import (
    AttentionRecorder,
    TokenPlaces,
    blocks,
    layout_of,
    patch_filters,
    position_table,
    watched,
)

EVERYWHERE = {
    f.title for f in FAMILIES if f.family in ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")
}
KINDS = {
    **dict.fromkeys(EVERYWHERE, "everywhere"),
    "CoAtNet": "everywhere",
    "Swin": "windows",
    "SwinV2": "windows",
    "PVT v2": "coarser keys",
    "MaxViT": "not known",
    "Hiera": "not known",
    "MLP-Mixer": "none",
    "ConvNeXt V2": "none",
    "ResNet": "none",
}
"""Kind of attention by family. A new family needs an entry here."""


def toy(family: Family) -> Any:
    torch.manual_seed(0)
    return create_timm_model(
        family.example, image_size=family.image_size, in_chans=3, pretrained=False, args=dict(family.args)
    ).eval()


def vit(**args: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, **args}
    return create_timm_model(
        "vit_tiny_patch16_224", image_size=(16, 16), in_chans=3, pretrained=False, args=given
    ).eval()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.title)
@torch.no_grad()
def test_every_family(family: Family) -> None:
    model, images = toy(family), torch.randn(2, 3, *family.image_size)
    plain = model.forward_features(images)
    layouts: list[Any] = []

    def keep(weights: torch.Tensor) -> torch.Tensor:
        layouts.append(layout_of(model, tuple(weights.shape), 2, family.image_size))
        return weights

    with AttentionRecorder(keep) as recorder:
        recorded = model.forward_features(images)
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.forward_features(images), plain), "the model must be unchanged afterwards"
    for weights in recorder.found:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    kind = KINDS[family.title]
    assert bool(layouts) == (kind != "none")
    for layout, weights in zip(layouts, recorder.found, strict=True):
        if kind == "not known":
            assert isinstance(layout, str)
            continue
        assert isinstance(layout, TokenPlaces), layout
        assert layout.everywhere or kind != "everywhere"
        assert len(layout.queries) + layout.prefix == weights.shape[2]
        assert len(layout.keys) + layout.prefix == weights.shape[3]
    assert blocks(model)


@torch.no_grad()
def test_weights_are_those_of_the_formula() -> None:
    model, images = vit(), torch.randn(2, 3, 16, 16)
    seen: dict[str, torch.Tensor] = {}
    attention = model.blocks[1].attn
    attention.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out))
    with AttentionRecorder(lambda w: w) as recorder:
        model.forward_features(images)
    q, k, _ = seen["qkv"].view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(recorder.found[1], (q @ k.transpose(-1, -2) / 12**0.5).softmax(-1))
    layout = layout_of(model, tuple(recorder.found[1].shape), 2, (16, 16))
    assert isinstance(layout, TokenPlaces)
    assert (layout.prefix, layout.grid, layout.stride_px) == (1, (4, 4), 4)
    assert torch.equal(layout.queries, places((4, 4), 4))


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.sampled_from(["none", "float", "bool"]), st.sampled_from([None, 0.3]), st.booleans())
def test_what_is_written_out_is_torchs_attention(causal: bool, mask: str, scale: float | None, grouped: bool) -> None:
    torch.manual_seed(1)
    heads = 2 if grouped else 4
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 8)
    bias: Any = None
    if not causal and mask != "none":
        bias = torch.randn(5, 5)
        bias = (bias > -0.5) | torch.eye(5, dtype=torch.bool) if mask == "bool" else bias
    options: Any = {"attn_mask": bias, "is_causal": causal, "scale": scale, "enable_gqa": grouped}
    plain = F.scaled_dot_product_attention(q, k, v, **options)
    with AttentionRecorder(lambda w: w) as recorder:
        written_out = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(written_out, plain, rtol=1e-4, atol=1e-5)
    assert recorder.found[0].shape == (2, 4, 5, 5)


@torch.no_grad()
def test_watched_blocks_give_input_and_output() -> None:
    model, images = vit(), torch.randn(2, 3, 16, 16)
    named, seen = blocks(model), {}
    assert [name for name, _ in named] == ["blocks.0", "blocks.1", "blocks.2"]
    with watched([module for _, module in named], seen.__setitem__):
        model.forward_features(images)
    assert torch.equal(seen[0].after, seen[1].before)
    seen.clear()
    model.forward_features(images)
    assert not seen, "the hooks must be removed"


def test_filters_and_positions() -> None:
    model = vit()
    assert torch.equal(patch_filters(model), model.patch_embed.proj.weight)
    table, grid = position_table(model, (16, 16))
    assert grid == (4, 4)
    assert torch.equal(table, model.pos_embed[0, 1:])
    assert "has no table of positions" in str(
        position_table(toy(next(f for f in FAMILIES if f.title == "Swin")), (12, 20))
    )
    odd = vit()
    odd.pos_embed = torch.nn.Parameter(torch.zeros(1, 9, 24))
    assert "is not that of the cells" in str(position_table(odd, (16, 16)))
