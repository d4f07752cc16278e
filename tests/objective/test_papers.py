"""Numbers from papers and their authors' code, computed here by formula and compared with ours."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import mpp
from mpp.data.batch import Images, Units
from mpp.data.decoding.decode import centre_box, decode_crop
from mpp.encoders.support import FAMILIES, Family
from mpp.encoders.teacher import FrozenTeacher
from mpp.errors import UserError
from mpp.finetuning import model as supervised
from mpp.objective.build import build_mask, build_model
from mpp.objective.grid import sincos_positions
from mpp.objective.heads.transformer import TransformerHead
from mpp.objective.interfaces import TargetContext
from mpp.objective.targets.hog import HogTarget
from mpp.objective.weight_init import init_as_mae
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import bundled, check_recipe, load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.training.optimizer import finetune_groups, unfreeze
from tests.conftest import drawn_image, pretrain_recipe

SLOW = {"ResNet-ViT, R26", "ResNet-ViT, R50", "MLP-Mixer"}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def pretraining(name: str) -> PretrainRecipe:
    return load_recipe(f"pretrain/{name}", PretrainRecipe, {"data.shards": "given"})


def timm_model(name: str, size: tuple[int, int], **args: Any) -> Any:
    """Create a timm model without a classifier, for an image size if its family takes one."""
    try:
        return timm.create_model(name, num_classes=0, img_size=size, **args)
    except TypeError:
        return timm.create_model(name, num_classes=0, **args)


# ---- layer decay (BEiT's and MAE's code: the head at power 0, the last block at 1, the embedding at depth + 1) -------


def powers(encoder: nn.Module) -> dict[str, int]:
    """Return the power of the layer decay for each parameter."""
    groups = finetune_groups(encoder, nn.Linear(1, 1), weight_decay=0.1, layer_decay=0.5, head_lr_scale=1.0)
    names = {id(p): name for name, p in encoder.named_parameters()}
    own = [group for group in groups if "from_top" in group]
    return {names[id(p)]: round(-math.log2(group["lr_scale"])) for group in own for p in group["params"]}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.title, marks=[pytest.mark.slow] if f.title in SLOW else []) for f in FAMILIES],
)
def test_layer_decay_of_every_family(family: Family) -> None:
    encoder = timm_model(family.example, family.image_size, **family.args)
    found = powers(encoder)
    assert found.keys() == {name for name, _ in encoder.named_parameters()}
    after = {name for name in found if name.startswith(("fc_norm.", "head."))}
    assert {found[name] for name in after} <= {0}, "a norm after pooling must have the learning rate of the head"
    blocks = {power for name, power in found.items() if name not in after}
    depth = max(blocks) - 1
    assert blocks == set(range(1, depth + 2)), "no layer may be left out"
    embedding = [name for name in found if name.startswith(("patch_embed.", "stem.", "conv1.", "bn1."))]
    assert {found[name] for name in embedding} == {depth + 1}
    if hasattr(encoder, "blocks") and family.family not in ("MlpMixer",):
        assert depth == len(encoder.blocks)
        assert {found[name] for name in found if name.startswith(f"blocks.{depth - 1}.")} == {1}
    if any(name.startswith("rope.") for name in found):
        assert found["rope.freqs"] == depth + 1, "every block reads the rotary positions"


def test_weight_decay_is_timms() -> None:
    for family in FAMILIES:
        if family.title in SLOW:
            continue
        encoder = timm_model(family.example, family.image_size, **family.args)
        names = {id(p): name for name, p in encoder.named_parameters()}
        skip = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else ()
        theirs = timm.optim.param_groups_layer_decay(encoder, weight_decay=0.1, no_weight_decay_list=skip)
        ours = finetune_groups(encoder, nn.Linear(1, 1), weight_decay=0.1, layer_decay=0.5, head_lr_scale=1.0)
        of = [
            {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"] if id(p) in names}
            for groups in (theirs, ours)
        ]
        assert of[0] == of[1], family.title


def test_gradual_unfreezing_counts_no_layer_for_a_norm_after_pooling() -> None:
    encoder = timm_model("beit_base_patch16_224", (16, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2)
    groups = finetune_groups(encoder, nn.Linear(1, 1), weight_decay=0.1, layer_decay=0.5, head_lr_scale=1.0)
    unfreeze(groups, frozen_steps=40, gradual=True)
    names = {id(p): name for name, p in encoder.named_parameters()}
    begins = {names[id(p)]: g["starts_at_step"] for g in groups if "from_top" in g for p in g["params"]}
    assert [begins[f"blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [30, 20, 10]
    assert begins["patch_embed.proj.weight"] == 40
    assert begins["fc_norm.weight"] == 10


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n in bundled() if n.startswith("pretrain/")))
def test_no_recipe_trains_with_a_default_of_timms_that_it_does_not_state(name: str) -> None:
    """Drop path, dropout and layer scale are as the recipe states."""
    recipe = load_recipe(name, PretrainRecipe, {"data.shards": "given"})
    with torch.device("meta"):
        model = timm_model(recipe.encoder.name, recipe.data.image_size, **recipe.encoder.args)
    stated = recipe.encoder.args
    drop_path = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max([0.0, *drop_path]) == pytest.approx(stated.get("drop_path_rate", 0.0))
    dropout = {m.p for m in model.modules() if isinstance(m, nn.Dropout)} - {0.0}
    assert dropout <= {v for k, v in stated.items() if k.endswith("drop_rate")}
    scales = [n for n, _ in model.named_parameters() if n.rpartition(".")[2].startswith("gamma")]
    assert bool(scales) == ("init_values" in stated)


def peak_lr(recipe: PretrainRecipe) -> float:
    return recipe.optim.base_lr * recipe.optim.global_batch_size / 256


def test_simmim() -> None:
    """The recipes match the released configurations.

    30 of 49 units are hidden. The learning rate is 4e-4 for 2048 images after 10 epochs. Swin has no drop path.
    """
    vit, swin = pretraining("simmim_vit_b16"), pretraining("simmim_swin_b")
    assert build_mask(vit).count((7, 7), 0.5) == math.ceil(0.6 * 49) == 30
    assert build_mask(swin).count((6, 6), 0.5) == math.ceil(0.6 * 36) == 22
    for recipe in (vit, swin):
        assert peak_lr(recipe) == pytest.approx(4e-4)
        assert recipe.optim.warmup_epochs == 10
        assert recipe.optim.clip_grad_norm == 5.0
    assert swin.encoder.args["drop_path_rate"] == 0.0
    assert (vit.encoder.name, vit.encoder.args) == (
        "beit_base_patch16_224",
        {"drop_path_rate": 0.1, "init_values": 0.1},
    )


def test_data2vec() -> None:
    """The recipe matches the released command for ViT-B."""
    recipe = pretraining("data2vec_vit_b16")
    assert build_mask(recipe).count((14, 14), 0.5) == 120
    assert recipe.encoder.args == {"drop_path_rate": 0.25, "attn_drop_rate": 0.05, "init_values": 1e-4}
    assert (peak_lr(recipe), recipe.optim.warmup_epochs, recipe.optim.clip_grad_norm) == (pytest.approx(2e-3), 10, 3.0)
    assert recipe.data.crop_scale == (0.08, 1.0)
    assert recipe.target.model_dump() == {
        "name": "ema_teacher", "layers": 6, "norm_average": True, "decay": 0.9998, "decay_end": 0.9998
    }  # fmt: skip


def test_beit_hides_75_patches() -> None:
    assert build_mask(pretraining("beit_b16")).count((14, 14), 0.5) == 75


@pytest.mark.parametrize("norm_average", [False, True])
def test_the_average_of_the_last_blocks_may_be_normed_once_more(norm_average: bool) -> None:
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", (8, 8), patch_size=4, embed_dim=16, depth=3, num_heads=2)
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    images = Images(raw, torch.randn(2, 3, 8, 8), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    found = FrozenTeacher(model, layers=2, norm_average=norm_average)(images, (2, 2))
    blocks = model.forward_intermediates(images.normalised, indices=2, output_fmt="NLC", intermediates_only=True)
    expected = sum(nn.functional.layer_norm(b, (16,)) for b in blocks) / 2
    expected = nn.functional.layer_norm(expected, (16,)) if norm_average else expected
    torch.testing.assert_close(found, expected)
    assert (found.std(-1, correction=0) - 1).abs().max() < 1e-3 or not norm_average


# ---- MAE -------------------------------------------------------------------------------------------------------------


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Return the std of Xavier's uniform distribution, sqrt(2 / (in + out)) (Glorot & Bengio 2010, equation 16)."""
    return math.sqrt(2 / (fan_in + fan_out))


def test_maes_initial_weights() -> None:
    """The weights of ViT-B have the right standard deviations, and biases are zero.

    qkv 0.0255, proj 0.0361, patch embedding 0.0361, tokens 0.02, fc2 of the decoder 0.0280.
    """
    torch.manual_seed(0)
    model = timm_model("vit_base_patch16_224", (224, 224), depth=2)
    init_as_mae(model, (14, 14))
    weights = dict(model.named_parameters())
    wanted = {
        "blocks.1.attn.qkv.weight": xavier_std(768, 3 * 768),
        "blocks.1.attn.proj.weight": xavier_std(768, 768),
        "blocks.1.mlp.fc1.weight": xavier_std(768, 3072),
        "patch_embed.proj.weight": xavier_std(3 * 16 * 16, 768),
        "cls_token": 0.02,
    }
    for name, std in wanted.items():
        assert float(weights[name].detach().std()) == pytest.approx(std, rel=0.05 if name == "cls_token" else 0.01), (
            name
        )
    assert all(not p.detach().any() for n, p in weights.items() if n.startswith("blocks.") and n.endswith("bias"))
    assert not model.pos_embed.requires_grad
    head = TransformerHead(768, 768, False, dim=512, depth=1, num_heads=16)
    assert float(head.blocks[0].linear2.weight.detach().std()) == pytest.approx(xavier_std(2048, 512), rel=0.01)
    assert float(head.blocks[0].self_attn.in_proj_weight.detach().std()) == pytest.approx(
        xavier_std(512, 1536), rel=0.01
    )
    assert all(not p.detach().any() for n, p in head.named_parameters() if n.endswith("bias"))
    assert all(pretraining(f"mae_vit_{size}").encoder.weight_init == "mae" for size in ("b16", "l16", "h14"))


def test_maes_positions() -> None:
    """The first half of the channels encodes the column, the second half the row.

    Each half consists of sines, then cosines, with frequencies 1 / 10000^(i / (D/4)).
    """
    dim, (rows, cols) = 8, (2, 3)
    found = sincos_positions((rows, cols), dim)
    for r in range(rows):
        for c in range(cols):
            expected = [
                f(place * 10000 ** (-i / (dim / 4)))
                for place in (c, r)
                for f in (math.sin, math.cos)
                for i in range(dim // 4)
            ]
            np.testing.assert_allclose(found[r * cols + c], expected, atol=1e-6)
    model = timm_model("vit_tiny_patch16_224", (8, 12), patch_size=4, embed_dim=dim, depth=1, num_heads=1)
    init_as_mae(model, (rows, cols))
    assert torch.equal(model.pos_embed[0, 1:], found)
    assert not model.pos_embed[0, 0].any(), "the class token has no position"


def test_maes_weights_are_for_plain_vits() -> None:
    for name, args in (("swin_tiny_patch4_window7_224", {}), ("beit_base_patch16_224", {"depth": 1})):
        recipe = pretrain_recipe(
            "none", "none", **{"encoder": {"name": name, "args": args, "weight_init": "mae"}, "data.image_size": 224}
        )
        with pytest.raises(UserError, match="encoder.weight_init: mae is for plain ViTs"):
            build_model(recipe)
    trained = pretrain_recipe("none", "none", **{"encoder.pretrained": True, "encoder.weight_init": "mae"})
    with pytest.raises(UserError, match="encoder.weight_init: mae is for random weights"):
        build_model(trained)


@pytest.mark.parametrize("head", ["transformer", "cross_attention"])
@pytest.mark.parametrize("prefix_tokens", [True, False])
def test_the_decoder_reads_the_class_token(head: str, prefix_tokens: bool) -> None:
    """Otherwise the query of the class token in the last block would get no gradient."""
    changes = {"corruption": "drop", "head": {"name": head, "prefix_tokens": prefix_tokens}, "mask.ratio": 0.75}
    model, grid = build_model(pretrain_recipe("none", "none", **changes))
    last = model.encoder.model.blocks[-1]
    seen: list[Tensor] = []
    last.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    raw = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.ones(2, *grid, dtype=torch.bool)
    mask[:, 0] = False
    model(raw, Units(mask, 12, torch.rand(2, 4, *grid))).sum().backward()
    assert bool(seen[0][:, 0].any()) == prefix_tokens
    assert seen[0][:, 1:].any()


# ---- fine-tuning -----------------------------------------------------------------------------------------------------

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def finetune_recipe(**changes: Any) -> FinetuneRecipe:
    values: dict[str, Any] = {
        "job": "finetune", "out": "none", "encoder": "scratch",
        "architecture": {"name": "vit_tiny_patch16_224", "args": VIT},
        "data": {"train": "none", "val": "none", "image_size": 16},
        "optim": {"steps": 1},
    }  # fmt: skip
    return check_recipe({**values, **changes}, FinetuneRecipe)


def test_maes_fine_tuning_norms_the_mean(shards: Path, tmp_path: Path) -> None:
    """fc_norm gives norm(mean(tokens)) with a new norm. The default is mean(norm(tokens)) with the encoder's norm."""
    out = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 2})).out
    encoder = mpp.load_encoder(out).eval()
    with torch.no_grad():
        encoder.norm.weight.fill_(3.0)  # unlike in a new norm
    source = tmp_path / "own"
    timm.models.save_for_hf(encoder, str(source), safe_serialization=True)
    x = torch.randn(2, 3, 16, 16)
    tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(x)))
    tokens = encoder.blocks(tokens)[:, 1:]
    for fc_norm, expected in (
        (None, encoder.norm(tokens).mean(1)),
        (False, encoder.norm(tokens).mean(1)),
        (True, nn.functional.layer_norm(tokens.mean(1), (32,), eps=1e-6)),
    ):
        recipe = finetune_recipe(encoder=str(source), architecture=None, fc_norm=fc_norm)
        model = supervised.build(recipe, "pretrained", 0, 2).eval()
        torch.testing.assert_close(model.encoder(x), expected, atol=1e-5, rtol=1e-5)
    assert load_recipe(
        "finetune/vit_base", FinetuneRecipe, dict.fromkeys(("encoder", "data.train", "data.val"), "x")
    ).fc_norm


def test_where_there_is_one_norm_it_cannot_be_chosen() -> None:
    swin = {"name": "swin_tiny_patch4_window7_224", "args": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1]}}
    with pytest.raises(UserError, match="fc_norm: timm's SwinTransformer has its norm in one place; leave out fc_norm"):
        supervised.build(finetune_recipe(architecture=swin, fc_norm=True), "scratch", 0, 2)
    with pytest.raises(UserError, match="fc_norm: norms the mean of the patch tokens; not with pool: token"):
        finetune_recipe(pool="token", fc_norm=True)


def test_beit_pools_as_it_always_did() -> None:
    """BEiT's norm comes after the pooling by default. With fc_norm=False or the class token it comes before."""
    beit = {"name": "beit_base_patch16_224", "args": VIT}
    for changes, after in (({}, True), ({"fc_norm": False}, False), ({"pool": "token"}, False)):
        encoder = supervised.build(finetune_recipe(architecture=beit, **changes), "scratch", 0, 2).encoder
        assert isinstance(encoder.fc_norm, nn.LayerNorm) == after
        assert isinstance(encoder.norm, nn.LayerNorm) != after


def test_a_swin_is_fine_tuned_with_larger_windows(tmp_path: Path) -> None:
    """SimMIM has windows of 6 cells at 192 px and of 7 at 224 px in fine-tuning. Here they have 3 and 4 cells."""
    args = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "patch_size": 4, "window_size": 3}
    swin = timm_model("swin_tiny_patch4_window7_224", (24, 24), **args)
    timm.models.save_for_hf(swin, str(tmp_path), safe_serialization=True)
    recipe = finetune_recipe(
        encoder=str(tmp_path),
        architecture={"args": {"window_size": 4}},
        data={"train": "none", "val": "none", "image_size": 32},
    )
    encoder = supervised.build(recipe, "pretrained", 0, 2).encoder
    assert encoder.layers[0].blocks[0].window_size == (4, 4)
    assert encoder.layers[0].blocks[0].attn.relative_position_bias_table.shape == (49, 1)
    own, there = (m.layers[0].blocks[0].attn.qkv.weight for m in (swin, encoder))
    assert torch.equal(own, there)


# ---- MaskFeat --------------------------------------------------------------------------------------------------------


def hog_by_formula(image: np.ndarray, square_px: int, bins: int = 9) -> np.ndarray:
    """Compute HOG pixel by pixel: (H, W) -> (H / square, W / square, bins).

    It uses Sobel kernels, reflected borders, and one bin for each pixel.
    """
    height, width = image.shape
    x = np.pad(image.astype(np.float64), 1, mode="reflect")
    found = np.zeros((height // square_px, width // square_px, bins))
    for r in range(height):
        for c in range(width):
            window = x[r : r + 3, c : c + 3]
            across = (window * [[1, 0, -1], [2, 0, -2], [1, 0, -1]]).sum()
            down = (window * [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]).sum()
            number = math.floor(math.atan2(across, down) / math.pi * bins) % bins
            found[r // square_px, c // square_px, number] += math.hypot(across, down)
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


@pytest.mark.parametrize("square_px", [4, 8])
def test_hog_is_the_released_layers(square_px: int) -> None:
    raw = torch.from_numpy(np.asarray(drawn_image(3, 32)).copy()).permute(2, 0, 1)[None]
    noise = torch.randint(0, 40, raw.shape, generator=torch.Generator().manual_seed(0))
    raw = (raw.int() + noise).clamp(0, 255).to(torch.uint8)

    def no_teacher(**asked: Any) -> None:
        raise AssertionError

    target = HogTarget(TargetContext(3, 16, (2, 2), no_teacher, no_teacher), square_px=square_px)
    side = 16 // square_px
    half = torch.full((3, 1, 1), 0.5)
    found = target(Images(raw, raw.float(), half, half)).view(2, 2, 3, 9, side, side)
    for channel in range(3):
        expected = hog_by_formula(raw[0, channel].numpy(), square_px).reshape(2, side, 2, side, 9)
        ours = found[:, :, channel].permute(0, 3, 1, 4, 2).numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-5)


# ---- decoding --------------------------------------------------------------------------------------------------------


def large_picture(width: int, height: int) -> Image.Image:
    """Return an image of smooth shapes, like a photograph of this size."""
    rows, cols = np.mgrid[:height, :width]
    waves = [np.sin(rows / a + cols / b) for a, b in ((37, 61), (83, 29), (51, 47))]
    return Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(1000, 750), (1203, 907), (801, 1601)])
def test_large_jpegs_are_cut_where_pillow_cuts_them(width: int, height: int) -> None:
    """Large JPEGs are decoded at a fraction of their size, at which crops rarely end between two pixels."""
    picture = large_picture(width, height)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    for side in (64, 100, 224):
        left, top, w, h = centre_box(width, height, (side, side), 0.875)
        found = decode_crop(
            stream.getvalue(), partial(centre_box, size=(side, side), fraction=0.875), (side, side), channels=3, formats=("JPEG",),
            max_image_pixels=10**8,
        )  # fmt: skip
        cropped = picture.crop((left, top, left + w, top + h)).resize((side, side), Image.Resampling.BICUBIC)
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(cropped)).mean()
        assert difference < 1.2, side
