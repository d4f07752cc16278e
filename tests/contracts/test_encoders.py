"""Contract tests of encoders with every masking mechanism: no leak, plain timm without a mask, a native state dict."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from mpp.encoders.adapter import TimmEncoder, adapt
from mpp.encoders.cells import Cells, Corrupted
from mpp.encoders.shortcuts import embeds_at, runs_for
from mpp.encoders.support import FAMILIES, TRIED, Family, table
from mpp.errors import MppWarning, UserError
from mpp.objective import contract
from mpp.objective.build import build_model
from mpp.objective.contract import MECHANISMS, ContractCase, batch_of, shaken
from mpp.objective.model import MaskedPatchModel
from tests.conftest import pretrain_recipe

BY_TITLE = {f.title: f for f in FAMILIES}
ALIKE = {"ResNet-ViT, R26", "ResNet-ViT, R50"}
"""Large families that differ in their number of layers. `test_contract` only checks them for leaks, except in WHOLE."""
WHOLE = {("ResNet-ViT, R50", "token")}
SLOW = {"ResNet-ViT, R26", "ResNet-ViT, R50", "MLP-Mixer"}
"""Families whose models timm cannot build small enough. Each takes a minute."""
VIT = ContractCase.of(BY_TITLE["ViT (Ti, S, B, L, H)"])
DROPPING = [f for f in FAMILIES if f.family in ("VisionTransformer", "VisionTransformerDistilled", "Eva")]


def families_and_ways() -> list[Any]:
    stored = {r["title"]: r for r in table()}
    return [
        pytest.param(f, way, id=f"{f.title}-{way}", marks=[pytest.mark.slow] if f.title in SLOW else [])
        for f in FAMILIES
        for way in stored[f.title]["ways"]
    ]


@pytest.mark.parametrize(("family", "way"), families_and_ways())
def test_contract(family: Family, way: str) -> None:
    leaks_alone = family.title in ALIKE and (family.title, way) not in WHOLE
    checks = ("no leak",) if leaks_alone else tuple(contract.CHECKS)
    broken = {name: fault for name, fault in contract.check(ContractCase.of(family), way, checks).items() if fault}
    assert not broken


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "way"),
    [p for p in families_and_ways() if p.values[0].title in ALIKE and (p.values[0].title, p.values[1]) not in WHOLE],
)
def test_the_rest_of_the_contract(family: Family, way: str) -> None:
    broken = {name: fault for name, fault in contract.check(ContractCase.of(family), way).items() if fault}
    assert not broken


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.title not in SLOW], ids=lambda f: f.title)
def test_the_support_table_says_what_is_found(family: Family) -> None:
    """`python tools/support_table.py` writes the table."""
    row = next(r for r in table() if r["title"] == family.title)
    encoder = ContractCase.of(family).encoder()
    assert encoder.family == family.family == row["family"]
    assert (row["example"], row["models"]) == (family.example, family.models)
    assert {k: row[k] for k in contract.probed(encoder)} == contract.probed(encoder)
    assert list(row["ways"]) == contract.offered(encoder)
    assert not any(row["ways"].values()), "a family in the table must have passed every check"


def test_every_family_has_a_row_and_a_model_of_timm() -> None:
    assert [r["title"] for r in table()] == [f.title for f in FAMILIES]
    assert all(timm.is_model(f.example) for f in FAMILIES)
    for f in FAMILIES:
        for pattern in f.models.split(", "):
            assert timm.list_models(pattern), f"{f.title}: timm has no {pattern}"


class TestTheContractNotices:
    """Each test introduces a fault, which the check that guards against it must report."""

    def check(self, name: str, way: str = "token") -> str:
        return contract.check(VIT, way, (name,))[name]

    def test_hidden_pixels_that_are_not_blanked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for way in ("token", "drop"):
            monkeypatch.setattr(f"mpp.objective.corruptions.{way}.blank_hidden", lambda images, hidden: images)
        hybrid = ContractCase.of(BY_TITLE["ResNet-ViT, small stem"])  # its kernels reach beyond the borders of patches
        assert "a hidden pixel reaches a prediction" in contract.check(hybrid, "drop", ("no leak",))["no leak"]

    def test_a_mask_token_that_is_not_put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forgets(self: TimmEncoder, module: Any, args: Any, out: Any) -> None:
            self._now, self._next = self._next, None

        monkeypatch.setattr(TimmEncoder, "_at_stem", forgets)
        assert "no gradient reaches corruption.mask_token" in self.check("gradients")

    def test_mask_tokens_without_positions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def joining(self: TimmEncoder, x: Corrupted, cells: Cells) -> torch.Tensor:
            assert x.mask_token is not None
            return x.mask_token.expand(*cells.predicted.shape, -1)

        monkeypatch.setattr(TimmEncoder, "_joining", joining)
        assert "all get the same prediction" in self.check("places differ", "joining")

    def test_rows_of_rotary_positions_that_are_not_gathered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = TimmEncoder._at_block

        def without_rope(self: TimmEncoder, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            found = plain(self, i, module, args, kwargs)
            return found and (found[0], kwargs)

        monkeypatch.setattr(TimmEncoder, "_at_block", without_rope)
        rope = ContractCase.of(BY_TITLE["RoPE ViT, axial"])
        assert "Error" in contract.check(rope, "drop", ("no leak",))["no leak"]

    def test_a_mask_that_stays_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = TimmEncoder._at_stem

        def stays(self: TimmEncoder, module: Any, args: Any, out: Any) -> Any:
            again = self._next
            found = plain(self, module, args, out)
            self._next = again
            return found

        monkeypatch.setattr(TimmEncoder, "_at_stem", stays)
        monkeypatch.setattr(TimmEncoder, "__setattr__", _keeps_next)
        assert "not plain timm" in self.check("plain without a mask")

    def test_a_model_that_does_not_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
        assert "the loss does not fall" in self.check("learns")


@pytest.mark.parametrize("way", ["token", "joining"])
@pytest.mark.parametrize("family", [f for f in DROPPING if f.title not in SLOW], ids=lambda f: f.title)
def test_a_last_block_that_runs_for_what_is_read_gives_what_the_whole_gives(family: Family, way: str) -> None:
    model = shaken(ContractCase.of(family).model(way)).train()
    plain = family.family != "Eva"  # Eva's blocks are given rotary positions
    assert model.encoder.prunes == plain
    cut = loss_and_gradients(model)
    model.only_predicted = False
    the_same(cut, loss_and_gradients(model))


@pytest.mark.parametrize("way", ["token", "joining", "drop"])
@pytest.mark.parametrize("family", [f for f in DROPPING if f.title not in SLOW], ids=lambda f: f.title)
def test_embedding_visible_cells_alone_gives_what_embedding_all_gives(family: Family, way: str) -> None:
    model = shaken(ContractCase.of(family).model(way)).train()
    encoder = model.encoder
    assert encoder.embeds_visible == (type(encoder.model.patch_embed) is PatchEmbed)  # hybrids have another stem
    if encoder.embeds_visible:
        cut = loss_and_gradients(model)
        del encoder.model.get_submodule(encoder.stem.path).forward  # restores the forward of the class
        the_same(cut, loss_and_gradients(model))


def loss_and_gradients(model: MaskedPatchModel) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(*batch_of(model)).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def the_same(cut: tuple[float, dict[str, torch.Tensor]], whole: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    assert cut[1].keys() == whole[1].keys()
    for name, gradient in cut[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-3, atol=1e-5)


class TestLayersThatDoMore:
    """A layer that does more than the shortcuts support is computed in full."""

    def test_embeddings(self) -> None:
        def of(name: str, **args: Any) -> bool:
            size = (64, 96)
            embedding = timm.create_model(name, img_size=size, depth=1, **args).patch_embed
            return embeds_at(embedding, 3, size)

        tiny = {"embed_dim": 24, "num_heads": 2}
        assert of("vit_tiny_patch16_224", **tiny)
        assert of("vit_tiny_patch16_224", **tiny, dynamic_img_size=True)  # returns a map, not a list of tokens
        assert of("vit_tiny_patch16_224", **tiny, embed_norm_layer=torch.nn.LayerNorm)
        assert not of("vit_tiny_r_s16_p8_224", **tiny)
        overlapping = PatchEmbed((64, 96), 16, 3, 24)
        overlapping.proj = torch.nn.Conv2d(3, 24, 16, 16, dilation=1, padding=8)
        assert not embeds_at(overlapping, 3, (64, 96))

    def block(self, **args: Any) -> torch.nn.Module:
        return timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2, **args).blocks[0]

    def test_known_ones(self) -> None:
        assert runs_for(self.block())
        assert runs_for(self.block(qk_norm=True, init_values=1e-5, qkv_bias=False))
        block, before = self.block(), torch.random.get_rng_state()
        runs_for(block)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_another_kind_of_block(self) -> None:
        for kind in (ResPostBlock, ParallelScalingBlock):
            assert not runs_for(kind(24, 2))

    def test_a_gate_that_is_not_known_here(self) -> None:
        block: Any = self.block()
        block.attn = Attention(24, 2, gated=True)
        assert not runs_for(block)


def _keeps_next(self: TimmEncoder, name: str, value: Any) -> None:
    if name == "_next" and value is None and self.__dict__.get("_next") is not None:
        return
    torch.nn.Module.__setattr__(self, name, value)


def blocks_by_hand(model: MaskedPatchModel, x: Corrupted, cells: Cells) -> torch.Tensor:
    """Run the visible tokens through the first blocks and all tokens through the others, without hooks.

    Returns:
        (B, V + P, D) patch tokens, or (B, V, D) if no mask tokens join.
    """
    encoder = model.encoder
    plain = copy.deepcopy(encoder.model)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    tokens = plain._pos_embed(plain.patch_embed(x.images))
    tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
    tokens, p = plain.norm_pre(tokens), encoder.prefix_tokens

    def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[place] for image, place in zip(x, index, strict=True)])

    tokens = torch.cat([tokens[:, :p], rows(tokens[:, p:], cells.visible)], 1)
    places = cells.visible
    for i, block in enumerate(plain.blocks):
        if i == x.enter:
            tokens = torch.cat([tokens, encoder._joining(x, cells)], 1)
            places = torch.cat([cells.visible, cells.predicted], 1)
        if rope is None:
            tokens = block(tokens)
            continue
        of_block = rope[i] if rope.ndim == 4 else rope  # mixed: every block and head has its own positions
        images = []
        for one, place in zip(tokens, places, strict=True):
            images.append(block(one[None], rope=of_block[..., place, :]))
        tokens = torch.cat(images)
    return tokens[:, p:]


@pytest.mark.parametrize("family", [f for f in DROPPING if f.title not in SLOW], ids=lambda f: f.title)
@pytest.mark.parametrize("way", ["drop", "joining"])
def test_dropping_and_joining_compute_what_they_say(family: Family, way: str) -> None:
    model = shaken(ContractCase.of(family).model(way)).eval()
    raw, units = batch_of(model)
    images = model.images(raw)
    layout = model.layout(images, units)
    with torch.no_grad():
        x = model.corruption(images, layout.units)
        out = model.encoder(x, layout.cells)
        expected = blocks_by_hand(model, x, layout.cells)
    assert out.layout == ("visible" if way == "drop" else "visible+predicted")
    torch.testing.assert_close(out.tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in DROPPING if f.title not in SLOW], ids=lambda f: f.title)
def test_joining_before_block_0_is_token_mode(family: Family) -> None:
    """The block hooks and the stem hook must give the same tokens.

    CLIP-like and hybrid models also have a norm_pre or a stem before the blocks, which `blocks_by_hand` applies first.
    """
    model = shaken(ContractCase.of(family).model("joining")).eval()
    raw, units = batch_of(model)
    images = model.images(raw)
    layout = model.layout(images, units)
    with torch.no_grad():
        model.corruption.enter = 0
        x = model.corruption(images, layout.units)
        at_stem = model.encoder(x, layout.cells)
        joined = blocks_by_hand(model, x, layout.cells)
    visible = layout.cells.visible.shape[1]
    torch.testing.assert_close(at_stem.visible(), joined[:, :visible], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at_stem.predicted(), joined[:, visible:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("unit_px", "stem"),
    [(4, "patch_embed.backbone"), (16, "patch_embed.backbone"), (32, "patch_embed"), (64, "patch_embed")],
)
def test_a_hybrid_takes_mask_tokens_at_the_coarsest_stem_that_fits(unit_px: int, stem: str) -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0, img_size=(64, 128), embed_dim=24, depth=1)
    encoder = adapt(model, (64, 128), unit_px)
    assert encoder.stem is not None
    assert encoder.stem.path == stem


def test_cells_that_do_not_tile_the_image_are_refused() -> None:
    inception = timm.create_model("inception_v3", num_classes=0)
    with pytest.raises(
        UserError, match="InceptionV3 is not supported: at 320×320 px it gives 8×8 cells, where .* 10×10"
    ):
        adapt(inception, (320, 320))


def test_the_width_is_that_of_the_features() -> None:
    """SAM's encoder narrows the features in a neck, which is not used."""
    sam = timm.create_model("samvit_base_patch16", num_classes=0, img_size=32, embed_dim=24, depth=1, num_heads=2)
    assert sam.num_features != 24
    encoder = adapt(sam, (32, 32))
    assert encoder.dim == 24
    assert not any(p.requires_grad for p in sam.neck.parameters())


def test_torch_compile_finds_no_graph_break() -> None:
    """The forward pass of a masked plain ViT is one graph."""
    import torch._dynamo

    for way in MECHANISMS:
        model = VIT.model(way)
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(*batch_of(model))
        assert found.graph_break_count == 0, f"{way}: {found.break_reasons}"


@pytest.mark.parametrize("way", MECHANISMS)
def test_pickles_follow_themselves(way: str) -> None:
    model = VIT.model(way).eval()
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        before = model(*batch_of(model))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(*batch_of(twin)), before)


def recipe_of(name: str, size: Any, **changes: Any) -> Any:
    return pretrain_recipe(
        "none", "none", **{"encoder.name": name, "encoder.args": {}, "data.image_size": size, **changes}
    )


def test_a_family_nobody_tried_may_be_trained_where_the_probe_holds() -> None:
    assert "RegNet" not in TRIED
    with pytest.warns(MppWarning, match="regnety_002: no contract test has seen a RegNet.*no leak was found just now"):
        model, grid = build_model(recipe_of("regnety_002", (64, 96)))
    assert grid == (2, 3)
    assert model.encoder.stem is not None


def test_a_family_nobody_tried_is_refused_where_it_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.objective.corruptions.token.blank_hidden", lambda images, hidden: images)
    with pytest.raises(UserError, match="encoder.name: regnety_002: .*a hidden pixel reaches a prediction"):
        build_model(recipe_of("regnety_002", (64, 96)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.name": "vit_tinny_patch16_224"}, "encoder.name: timm .* has no model 'vit_tinny_patch16_224'. Did you mean vit_tiny"),
        ({"encoder.args": {"patchsize": 4}}, "encoder.args: .*patchsize"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": {}, "data.image_size": 224, "corruption.name": "drop", "head.name": "transformer"},
         "corruption.name: drop: SwinTransformer cannot run on a part of its tokens .*Use corruption.name: token .*pixel_patch"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": {}, "data.image_size": 224, "corruption.enter": 2},
         "corruption.enter: 2: SwinTransformer cannot run on a part"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": {}, "data.image_size": 224, "mask.unit_px": 2},
         "mask.unit_px: mask tokens need a multiple of the stem's stride, 4 px; got 2. .*pixel_patch"),
        ({"encoder.name": "resnet18", "encoder.args": {}, "data.image_size": 64}, "corruption.name: ResNet has no stem .*Use one of pixel_patch"),
        ({"encoder.name": "mixer_s32_224", "encoder.args": {"num_blocks": 2}, "data.image_size": 64}, "encoder.args: mixer_s32_224 does not take this"),
        ({"encoder.name": "tnt_s_patch16_224", "encoder.args": {}, "data.image_size": 33}, "data.image_size: .*stride of 16 px; expected multiples of it"),
        ({"encoder.name": "resnet18", "encoder.args": {}, "data.image_size": 64, "corruption.name": "pixel_patch", "encoder.args.patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"data.image_size": 18}, "data.image_size: .* stride of 4 px; expected multiples"),
        ({"mask.unit_px": 6}, "mask.unit_px: .*stride, 4 px"),
        ({"mask.unit_px": 32}, "data.image_size: must be multiples of the mask's unit"),
        ({"corruption.enter": 3}, "corruption.enter: the encoder has blocks 0 to 1; got 3. .*drop"),
        ({"corruption.name": "drop", "head.name": "linear"}, "head.name: .*Use one of cross_attention, transformer"),
        ({"head.name": "transformer", "head.dim": 30}, "head: dim must be a multiple of 4"),
        ({"corruption.name": "pixel_patch", "mask.unit_px": 2, "head.name": "transformer"}, "head.name: mask units of 2 px are parts .*Use one of linear, mlp"),
        ({"corruption.name": "drop", "mask.unit_px": 2, "head.name": "transformer"}, "corruption.name: drop: mask units must be multiples of the encoder's stride, 4 px"),
        ({"target.name": "ema_teacher", "mask.unit_px": 2, "corruption.name": "pixel_patch"}, "target: mask.unit_px: 2 px is less than the encoder's stride"),
        ({"target.name": "ema_teacher", "target.layers": 3}, "target: layers: VisionTransformer has 2 last ones of one shape; got 3"),
        ({"encoder.args": {"num_classes": 10}}, "encoder.args.num_classes: is not for a recipe to set here"),
        ({"target.name": "teacher", "target.teacher": "vit_tiny_patch16_224", "target.args": {"in_chans": 3}}, "target.args.in_chans: is not for a recipe"),
        ({"target.name": "teacher", "target.teacher": "crossvit_tiny_240", "target.pretrained": False}, "target.teacher: crossvit_tiny_240 "),
        ({"target.name": "teacher", "target.teacher": "/tmp"}, "target.teacher: /tmp: no encoder in it .*is the run finished"),
        ({"mask.name": "attention", "mask.teacher": "vit_small_patch16_18x2_224", "mask.pretrained": False}, "mask.teacher: attention is read from plain ViTs"),
        ({"target.name": "teacher", "target.teacher": "vit_none"}, "target.teacher: timm .* has no model 'vit_none'"),
        ({"mask.name": "attention", "mask.teacher": "pvt_v2_b0", "mask.pretrained": False}, "mask.teacher: attention is read from plain ViTs"),
        ({"target.name": "downsized_color", "target.side": 3}, "target: side: must divide the cell, 4 px; got 3"),
        ({"target.name": "mean_color", "target.bits": 6}, "target: bits: 6 for 3 channels"),
        ({"target.name": "hog", "target.square_px": 3}, "target: square_px: must divide the cell"),
        ({"mask.name": "grid", "mask.period": 1}, "mask: period: 2 or more"),
        ({"corruption.name": "bert", "corruption.keep": 0.6, "corruption.random": 0.6}, r"corruption: random \+ keep: at most 1"),
    ],
)  # fmt: skip
def test_what_cannot_work_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_model(pretrain_recipe("none", "none", **changes))
    assert "\n" not in str(error.value)
