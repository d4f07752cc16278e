"""Layouts of other projects give timm's numbers. They are tested with the project's own model, or with the names it
documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from mpp.exchange import naming_rules as keymap
from mpp.exchange.naming import mmpretrain, transformers

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 4}
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def whole(found: dict[str, Tensor], model: nn.Module, layout: str) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix and the state of the model. The layout must find the whole state."""
    wanted = model.state_dict()
    covered = keymap.coverage(found, wanted, layout)
    prefix, made = max(covered.items(), key=lambda item: len(item[1]))
    assert not wanted.keys() - made.keys()
    return prefix, {name: made[name].of(found, prefix) for name in wanted}


def shaken(model: nn.Module) -> Any:
    """Fill a model with random numbers about as large as trained ones, so that swapped weights are noticed."""
    torch.manual_seed(0)
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            value.data = torch.randn_like(value) * 0.3
    return model.eval()


def both(*names: str) -> list[str]:
    return [f"{name}.{last}" for name in names for last in ("weight", "bias")]


def documented_mae() -> list[tuple[str, str]]:
    """Return (their name, timm's name) of facebookresearch/mae, models_mae.py: timm's names of its time, without the
    decoder.
    """
    return [(n, n) for n in ("cls_token", "pos_embed")] + [
        (n, n) for n in both("patch_embed.proj", *(f"blocks.{i}.{b}" for i in range(2) for b in BLOCK), "norm")
    ]


def documented_mmpretrain_vit() -> list[tuple[str, str]]:
    """Return (their name, timm's name) of open-mmlab/mmpretrain, backbones/vision_transformer.py."""
    inner = dict(zip(BLOCK, ("ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1"), strict=True))
    pairs = [("patch_embed.projection", "patch_embed.proj"), ("ln1", "norm")]
    pairs += [(f"layers.{i}.{inner[b]}", f"blocks.{i}.{b}") for i in range(2) for b in BLOCK]
    found = [("cls_token", "cls_token"), ("pos_embed", "pos_embed")]
    return found + [(f"{a}.{last}", f"{b}.{last}") for a, b in pairs for last in ("weight", "bias")]


def documented_mmselfsup_vit() -> list[tuple[str, str]]:
    """Return the same names before mmpretrain, when norms were called norm."""
    return [(a.replace(".ln", ".norm").replace("ln1.", "norm1."), b) for a, b in documented_mmpretrain_vit()]


def documented_swin(mm: bool) -> list[tuple[str, str]]:
    """Return the names of microsoft/Swin-Transformer and SimMIM, or of mmpretrain's backbones/swin_transformer.py."""
    inner = {b: b for b in BLOCK}
    if mm:
        theirs = ("norm1", "attn.w_msa.qkv", "attn.w_msa.proj", "norm2", "ffn.layers.0.0", "ffn.layers.1")
        inner = dict(zip(BLOCK, theirs, strict=True))
    stage, attention = ("stages", "attn.w_msa") if mm else ("layers", "attn")
    pairs = [("patch_embed.projection" if mm else "patch_embed.proj", "patch_embed.proj")]
    pairs += [("patch_embed.norm", "patch_embed.norm"), ("norm3" if mm else "norm", "norm")]
    tables = []
    for i in range(3):
        pairs += [(f"{stage}.{i}.blocks.0.{inner[b]}", f"layers.{i}.blocks.0.{b}") for b in BLOCK]
        table = "relative_position_bias_table"
        tables += [(f"{stage}.{i}.blocks.0.{attention}.{table}", f"layers.{i}.blocks.0.attn.{table}")]
        if i < 2:  # at the end of a stage, but timm has it at the start of the next
            pairs += [(f"{stage}.{i}.downsample.norm", f"layers.{i + 1}.downsample.norm")]
            reduction = "downsample.reduction.weight"
            tables += [(f"{stage}.{i}.{reduction}", f"layers.{i + 1}.{reduction}")]
    return tables + [(f"{a}.{last}", f"{b}.{last}") for a, b in pairs for last in ("weight", "bias")]


def vit(**more: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **VIT, **more)


def swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=0, **SWIN)


DOCUMENTED: dict[str, tuple[str, str, Callable[[], nn.Module], list[tuple[str, str]], list[str]]] = {
    "MAE": ("timm", "model.", vit, documented_mae(), ["mask_token", "decoder_blocks.0.norm1.weight"]),
    "lightly, over timm": ("timm", "backbone.vit.", vit, documented_mae(), ["backbone.mask_token"]),
    "SimMIM, Swin": ("simmim", "model.encoder.", swin, documented_swin(mm=False), ["mask_token"]),
    "mmpretrain, ViT": ("mmpretrain", "state_dict.backbone.", vit, documented_mmpretrain_vit(), ["mask_token"]),
    "mmselfsup, ViT": ("mmpretrain", "state_dict.backbone.", vit, documented_mmselfsup_vit(), []),
}


@pytest.mark.parametrize("project", DOCUMENTED)
def test_documented_names(project: str) -> None:
    layout, prefix, build, pairs, beside = DOCUMENTED[project]
    model = shaken(build())
    state = model.state_dict()
    assert {ours for _, ours in pairs} == state.keys()
    found = {prefix + theirs: state[ours].clone() for theirs, ours in pairs}
    found |= {prefix + name: torch.ones(3) for name in beside}
    at, made = whole(found, model, layout)
    assert at == prefix
    assert all(torch.equal(made[name], state[name]) for name in state)
    # no earlier layout may accept these weights
    for other in itertools.takewhile(lambda name: name != layout, keymap.names()):
        assert all(len(c) < len(state) for c in keymap.coverage(found, state, other).values())


def test_simmim_vit_shares_its_table() -> None:
    model = shaken(
        timm.create_model(
            "beit_base_patch16_224", img_size=16, num_classes=0, global_pool="token", init_values=0.1, **VIT
        )
    )
    state = dict(model.state_dict())
    table = state["blocks.0.attn.relative_position_bias_table"]
    named = {f"encoder.{name}": value for name, value in state.items() if "table" not in name}
    named["encoder.rel_pos_bias.relative_position_bias_table"] = table
    prefix, made = whole(named, model, "simmim")
    assert prefix == "encoder."
    assert torch.equal(made["blocks.1.attn.relative_position_bias_table"], table)
    assert torch.equal(made["blocks.1.attn.q_bias"], state["blocks.1.attn.q_bias"])


class UnfoldMerging(nn.Module):
    """Patch merging of mmpretrain: torch's unfold, a norm, a linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        unfolded = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        h, w = x.shape[1] // 2, x.shape[2] // 2
        return self.reduction(self.norm(unfolded)).unflatten(1, (h, w))


def test_mmpretrain_swin() -> None:
    model = shaken(swin())
    state = model.state_dict()
    theirs, ours = shaken(UnfoldMerging(8)), PatchMerging(8)
    ours.load_state_dict({name: mmpretrain._merged(value) for name, value in theirs.state_dict().items()})
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    pairs = documented_swin(mm=True)
    assert {own for _, own in pairs} == state.keys()
    found = {"state_dict.backbone." + their: state[own] for their, own in pairs}
    _, made = whole(found, model, "mmpretrain")
    for _, own in pairs:
        expected = mmpretrain._merged(state[own]) if "downsample" in own else state[own]
        assert torch.equal(made[own], expected), own


def test_mmpretrain_beit() -> None:
    model = shaken(timm.create_model("beit_base_patch16_224", img_size=16, num_classes=0, init_values=0.1, **VIT))
    state = model.state_dict()
    pairs = [(a, b) for a, b in documented_mmpretrain_vit() if b in state]
    inner = ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.relative_position_bias_table")
    pairs += [(f"layers.{i}.{name}", f"blocks.{i}.{name}") for i in range(2) for name in inner]
    pairs += [(f"ln2.{last}", f"fc_norm.{last}") for last in ("weight", "bias")]
    assert {own for _, own in pairs} == state.keys()
    _, made = whole({"backbone." + their: state[own] for their, own in pairs}, model, "mmpretrain")
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_torchvision() -> None:
    from torchvision.models import VisionTransformer

    theirs = shaken(VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64, num_classes=3))
    ours = vit().eval()
    prefix, made = whole({f"model.vit.{n}": v for n, v in theirs.state_dict().items()}, ours, "torchvision")
    assert prefix == "model.vit."
    ours.load_state_dict(made)
    x = torch.randn(2, 3, 16, 16)
    theirs.heads = nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL |= {"image_size": 16, "patch_size": 4}
STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
PYRAMID = {
    "image_size": 64,
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTConfig", SMALL),
    "ViTForMaskedImageModeling": ("ViTConfig", SMALL | {"encoder_stride": 4, "qkv_bias": False}),
    "ViTForImageClassification": ("ViTConfig", SMALL | {"hidden_act": "gelu_new"}),
    "ViTMAEForPreTraining": ("ViTMAEConfig", SMALL | {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}),
    "DeiTModel": ("DeiTConfig", SMALL),
    "BeitModel": ("BeitConfig", SMALL | {"use_relative_position_bias": True}),
    "SwinModel": ("SwinConfig", STAGES),
    "PvtV2Model": ("PvtV2Config", PYRAMID),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    """A model of transformers with its own configuration gives the same features as timm's."""
    hub = pytest.importorskip("transformers")
    config_name, values = MODELS[name]
    config = getattr(hub, config_name)(**values)
    config.layer_norm_eps = 1e-5 if "Swin" in name else 1e-6  # as in timm
    theirs = shaken(getattr(hub, name)(config))
    found = config.to_dict()
    described = transformers.architecture(found)
    timm_name, args = described.name, described.own
    sized = {} if "Pvt" in name else {"img_size": found["image_size"]}
    ours = timm.create_model(timm_name, num_classes=0, **sized, **args).eval()
    _, made = whole(dict(theirs.state_dict()), ours, "transformers")
    ours.load_state_dict(made)
    size = found["image_size"]
    size = size if isinstance(size, int) else size[0]
    x = torch.randn(2, 3, size, size)
    encoder = getattr(theirs, config.model_type.split("_")[0], theirs)
    extra = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in name else {}  # MAE shuffles by it
    with torch.no_grad():
        expected = encoder(x, **extra).last_hidden_state
        features = ours.forward_features(x)
    if features.ndim == 4 and expected.ndim == 3:
        features = features.flatten(1, 2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "SwinModel", "PvtV2Model"])
def test_files_of_transformers(name: str) -> None:
    """The layout of transformers reads back what `renamed` writes."""
    hub = pytest.importorskip("transformers")
    config_name, values = MODELS[name]
    config = getattr(hub, config_name)(**values)
    described = transformers.architecture(config.to_dict())
    timm_name, args = described.name, described.own
    sized = {} if "Pvt" in name else {"img_size": config.image_size}
    ours = timm.create_model(timm_name, num_classes=0, **sized, **args)
    rules = {"SwinModel": transformers.SWIN, "PvtV2Model": transformers.PVT_V2}.get(name, transformers.VIT)
    theirs, left = keymap.renamed(ours.state_dict(), rules)
    assert not left
    _, made = whole(theirs, ours, "transformers")
    assert all(torch.equal(made[n], v) for n, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "resnet"}, "model_type: expected one of vit, vit_mae,.*; got 'resnet'"),
        ({"model_type": "vit", "hidden_act": "mish"}, "hidden_act: expected one of gelu,.*; got 'mish'"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "use_absolute_embeddings: must be false"),
        ({"model_type": "beit"}, "use_relative_position_bias: must be true"),
        (
            {"model_type": "beit", "use_relative_position_bias": True, "use_shared_relative_position_bias": True},
            "use_shared_relative_position_bias: must be false",
        ),
        ({"model_type": "swin", "hidden_act": "relu"}, "hidden_act: expected one of gelu; got 'relu'$"),
        ({"model_type": "pvt_v2", "strides": [2, 2, 2, 2]}, "strides: "),
    ],
)
def test_configurations_that_timm_has_nothing_for(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformers.architecture(config)


def test_sizes_have_timms_names() -> None:
    def named(**config: Any) -> tuple[str, dict[str, Any]]:
        found = transformers.architecture(config)
        return found.name, found.own

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    assert named(model_type="vit") == ("vit_base_patch16_224", {})
    assert named(model_type="vit_mae", **large) == ("vit_large_patch16_224", {})
    assert named(model_type="deit") == ("deit_base_distilled_patch16_224", {})
    assert named(model_type="vit", patch_size=32) == ("vit_base_patch16_224", {"patch_size": 32})


def test_widths_survive_rounding() -> None:
    """Ratios must survive the rounding of timm, which takes the whole part of width times ratio."""
    for width in range(8, 1400, 8):
        for hidden in range(8, 4 * width, 8 + width // 4):
            assert int(width * transformers._ratio(hidden, width)) == hidden
