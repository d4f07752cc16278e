"""Contract tests of encoders: what every timm model must do with every masking mechanism.

No hidden pixel may reach a prediction. Without a mask, the model must behave like plain timm, and its state dict must
stay native. Every trained parameter must get a gradient, and the loss must fall. The tests run these checks on all
families of `encoders/support.py`. `mpp models --check` runs them on any model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from mpp.data.batch import NOISE, Images, Units
from mpp.encoders.adapter import TimmEncoder, adapt
from mpp.encoders.cells import repeat_cells
from mpp.encoders.creation import create_timm_model
from mpp.encoders.support import Family
from mpp.encoders.timm_model import TimmModel
from mpp.objective.interfaces import CorruptionContext, TargetContext
from mpp.objective.model import MaskedPatchModel, MaskLayout, Objective
from mpp.recipe import registry
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import TimmArgs
from mpp.rng import Purpose, stream

MECHANISMS: dict[str, tuple[str, JsonObject, str]] = {
    "token": ("token", {}, "linear"),
    "pixel": ("pixel_patch", {}, "mlp"),
    "drop": ("drop", {}, "cross_attention"),
    "joining": ("token", {"enter": 1}, "linear"),
}
"""Masking mechanism -> (corruption, arguments of the corruption, head)."""
BATCH = 4
LEARNING_STEPS = 30


class Broken(Exception):
    """Raised if a check fails. Its message is shown to users."""


@dataclass(frozen=True)
class ContractCase:
    """An encoder to check."""

    name: str
    args: TimmArgs
    image_size: tuple[int, int]

    @staticmethod
    def of(family: Family) -> ContractCase:
        return ContractCase(family.example, family.args, family.image_size)

    def plain(self, channels: int = 3) -> TimmModel:
        """Return the timm model without the adapter."""
        return create_timm_model(
            self.name, image_size=self.image_size, in_chans=channels, pretrained=False, args=self.args
        )

    def encoder(self, channels: int = 3) -> TimmEncoder:
        torch.manual_seed(0)
        return adapt(self.plain(channels), self.image_size)

    def model(self, mechanism: str, channels: int = 3, *, checkpointing: bool = False) -> MaskedPatchModel:
        corruption_name, arguments, head_name = MECHANISMS[mechanism]
        encoder = self.encoder(channels)
        if checkpointing:
            encoder.model.set_grad_checkpointing(True)
        unit = encoder.stride
        context = TargetContext(channels, unit, encoder.grid(self.image_size), _no_teacher, _no_teacher)
        stem_dim = encoder.stem.dim if encoder.stem else 0
        corruption = registry.component("corruption", corruption_name)(
            CorruptionContext(stem_dim, channels, unit), **arguments
        )
        target = registry.component("target", "pixels")(context)
        head = registry.component("head", head_name)(encoder.dim, target.dim, corruption.hidden_enter)
        objective = Objective("pixels", target, head, registry.component("loss", "mse")())
        half = [0.5] * channels
        return MaskedPatchModel(
            encoder, corruption, [objective], unit_px=unit, predict_fraction=1.0, guide=None, mean=half, std=half
        )


def _no_teacher(**asked: object) -> NoReturn:
    raise ValueError("no teacher in the contract")


def offered(encoder: TimmEncoder) -> list[str]:
    """Return the masking mechanisms that an encoder supports."""
    ways = ["token"] if encoder.stem is not None else []
    ways.append("pixel")
    if encoder.drops:
        ways.append("drop")
        if encoder.depth > 1:
            ways.append("joining")
    return ways


def batch_of(model: MaskedPatchModel, seed: int = 0) -> tuple[Tensor, Units]:
    """Return smooth images, (B, C, H, W) uint8, and masks that hide half of the units."""
    (h, w), unit = model.encoder.image_size, model.unit_px
    grid = (h // unit, w // unit)
    rng = np.random.default_rng(seed)
    channels = model.mean.shape[0]
    rows, cols = np.mgrid[0:h, 0:w]
    waves = [np.sin(rows / h * a + cols / w * b + c) for a, b, c in rng.uniform(1, 7, (BATCH * channels, 3))]
    pictures = 127 + 100 * np.stack(waves).reshape(BATCH, channels, h, w) + rng.normal(0, 5, (BATCH, channels, h, w))
    number = grid[0] * grid[1]
    count = max(number // 2, 1)
    masks = np.stack([stream(seed, Purpose.MASK, i).permutation(number) < count for i in range(BATCH)])
    noise = torch.from_numpy(rng.random((BATCH, len(NOISE), *grid), dtype=np.float32))
    units = Units(torch.from_numpy(masks.reshape(BATCH, *grid)), count, noise)
    return torch.from_numpy(pictures.clip(0, 255).astype(np.uint8)), units


@torch.no_grad()
def shaken(model: MaskedPatchModel) -> MaskedPatchModel:
    """Add noise to all weights in place, so that they look like trained ones, and return the model.

    Many families start with layers whose output is zero. The noise on a matrix has a tenth of the matrix's RMS, but at
    least a tenth of 1 / sqrt(row size), the scale that preserves the size of the input. The noise on a vector has a
    standard deviation of 0.1. With more noise, deep models overflow.
    """
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        usual = max(float(p.square().mean().sqrt()), (p[0].numel() or 1) ** -0.5) if p.ndim > 1 else 1.0
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * usual)
    return model


def predictions(model: MaskedPatchModel, images: Images, layout: MaskLayout) -> Tensor:
    """Predict with the same dropout and drop path in every call."""
    torch.manual_seed(1)
    return model.predict(images, layout)[0]


@torch.no_grad()
def no_leak(model: MaskedPatchModel, *, training: bool) -> None:
    """Check that predictions stay the same, bit for bit, whatever the hidden pixels are changed to.

    As a control, the visible pixels are changed, which must change some prediction.

    Raises:
        Broken: If a prediction is not finite, a hidden pixel changes a prediction, or the control fails.
    """
    before_mode = model.training
    model.train(training)
    raw, units = batch_of(model)
    images = model.images(raw)
    layout = model.layout(images, units)
    x = images.normalised
    kept = model.corruption.kept(layout.units)  # units shown on purpose, such as BERT's 10 %
    hidden = layout.units.hidden
    blind = hidden if kept is None else hidden & ~kept
    pixels = repeat_cells(blind, model.unit_px).unsqueeze(1)
    state = copy.deepcopy(model.state_dict())  # in training mode, each forward updates the batch statistics
    expected = predictions(model, images, layout)
    if not torch.isfinite(expected).all():
        raise Broken("predictions are not finite")
    generator = torch.Generator().manual_seed(2)
    changes = {
        "noise": torch.randn(x.shape, generator=generator),
        "zeros": torch.zeros_like(x),
        "another image's": x.flip(0),
        "huge values": torch.full_like(x, 1e30),
        "NaN": torch.full_like(x, torch.nan),
    }
    mode = "training" if training else "evaluation"
    for what, change in changes.items():
        model.load_state_dict(state)
        changed = Images(torch.where(pixels, 255 - raw, raw), torch.where(pixels, change, x), *images[2:])
        if not torch.equal(predictions(model, changed, layout), expected):
            raise Broken(f"a hidden pixel reaches a prediction in {mode} mode: {what} under the mask")
    model.load_state_dict(state)
    seen = images._replace(normalised=torch.where(pixels, x, x + 1))
    if torch.equal(predictions(model, seen, layout), expected):
        raise Broken("the control: a visible pixel does not change any prediction")
    model.load_state_dict(state)
    model.train(before_mode)


def _no_leak(subject: ContractCase, mechanism: str) -> None:
    model = shaken(subject.model(mechanism))
    for training in (False, True):
        no_leak(model, training=training)


def _places_differ(subject: ContractCase, mechanism: str) -> None:
    """Check that positions reach the hidden cells. Otherwise all cells of an image would get the same prediction."""
    model = shaken(subject.model(mechanism)).eval()
    raw, units = batch_of(model)
    images = model.images(raw)
    with torch.no_grad():
        prediction = predictions(model, images, model.layout(images, units))
    if prediction.shape[1] > 1 and (prediction[:, 1:] - prediction[:, :1]).abs().amax((1, 2)).min() <= 1e-6:
        raise Broken("hidden cells of one image all get the same prediction")


def _plain_without_mask(subject: ContractCase, mechanism: str) -> None:
    """Check that the model without a mask equals plain timm, even after a masked forward: hooks must drop the mask."""
    model, plain = subject.model(mechanism).eval(), subject.plain().eval()
    plain.load_state_dict(model.encoder.model.state_dict(), strict=True)
    x = torch.randn(BATCH, 3, *subject.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(*batch_of(model))
        if not torch.equal(model.encoder.model(x), plain(x)):
            raise Broken("without a mask the forward is not plain timm's")
        features, theirs = model.encoder.model.forward_features(x), plain.forward_features(x)
    if not torch.equal(features, theirs):
        raise Broken("without a mask the features are not plain timm's")


def _gradients(subject: ContractCase, mechanism: str) -> None:
    """Check that every trained parameter gets a gradient.

    The gradients of the first layer and of the mask tokens must not be zero.
    """
    model = shaken(subject.model(mechanism)).train()
    model(*batch_of(model)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if dead:
        raise Broken(f"no gradient reaches {', '.join(dead[:3])}")
    weights = (p for n, p in model.encoder.model.named_parameters() if n.endswith("weight"))
    first = next(p for p in weights if p.requires_grad)
    tokens = [p for n, p in model.named_parameters() if n.endswith("mask_token")]
    for what, p in (("the first layer", first), *(("the mask token", t) for t in tokens)):
        if p.grad is None or not p.grad.abs().sum() > 0:
            raise Broken(f"the gradient of {what} is zero")


def learn(model: MaskedPatchModel, batch: tuple[Tensor, Units]) -> list[float]:
    """Train on one batch for LEARNING_STEPS steps and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(LEARNING_STEPS):
        loss = model(*batch).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _learns(subject: ContractCase, mechanism: str) -> None:
    """Check that the loss falls. `_gradients` and the control of `no_leak` show that the encoder contributes."""
    model = subject.model(mechanism)
    losses = learn(model, batch_of(model))
    if not losses[-1] < 0.9 * losses[0]:
        raise Broken(f"the loss does not fall: {losses[0]:.3f} -> {losses[-1]:.3f} in {LEARNING_STEPS} steps")


def _channels(subject: ContractCase, mechanism: str) -> None:
    for channels in (1, 4, 13):
        model = subject.model(mechanism, channels).eval()
        with torch.no_grad():
            loss = model(*batch_of(model))
        if not torch.isfinite(loss).all():
            raise Broken(f"with {channels} channels the loss is not finite")


def _copies(subject: ContractCase, mechanism: str) -> None:
    """Check that a deep copy uses its own weights, not those of the original, which are set to zero."""
    model = subject.model(mechanism).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(*batch_of(model))
        for parameter in model.parameters():
            parameter.zero_()
        if not torch.equal(twin(*batch_of(twin)), before):
            raise Broken("a copy depends on the model it was copied from")


def _bf16(subject: ContractCase, mechanism: str) -> None:
    model = subject.model(mechanism).eval()
    with torch.no_grad():
        exact = float(model(*batch_of(model)).sum())
        with torch.autocast("cpu", torch.bfloat16):
            rough = float(model(*batch_of(model)).sum())
    if not abs(rough - exact) <= 0.03 * exact:
        raise Broken(f"in bf16 the loss is {rough:.4f}, in fp32 {exact:.4f}")


def _checkpointing(subject: ContractCase, mechanism: str) -> None:
    """Check that recomputed activations give the same gradients.

    Families without activation checkpointing pass, because a recipe that sets it for them is refused.
    """
    try:
        checkpointed = subject.model(mechanism, checkpointing=True)
    except (AssertionError, AttributeError):
        return
    gradients = []
    for model in (subject.model(mechanism), checkpointed):
        model.train()
        torch.manual_seed(1)
        model(*batch_of(model)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    if gradients[0].keys() != gradients[1].keys():
        raise Broken("with activation checkpointing other parameters get gradients")
    for name, gradient in gradients[0].items():
        if not torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-6):
            raise Broken(f"with activation checkpointing the gradient of {name} differs")


CHECKS: dict[str, Callable[[ContractCase, str], None]] = {
    "no leak": _no_leak,
    "places differ": _places_differ,
    "plain without a mask": _plain_without_mask,
    "gradients": _gradients,
    "learns": _learns,
    "1, 4, 13 channels": _channels,
    "copies": _copies,
    "bf16": _bf16,
    "activation checkpointing": _checkpointing,
}


def check(subject: ContractCase, mechanism: str, checks: tuple[str, ...] = tuple(CHECKS)) -> dict[str, str]:
    """Run the contract's checks on an encoder with one masking mechanism.

    Returns:
        Result of each check by name: empty if it passed, else the reason why it failed.
    """
    faults = {}
    for name in checks:
        try:
            CHECKS[name](subject, mechanism)
            faults[name] = ""
        except Broken as error:
            faults[name] = str(error)
        except Exception as error:  # an unknown family may raise any error
            faults[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return faults


def row(family: Family) -> JsonObject:
    """Return one row of the support table: what was probed, and the checks that fail for each masking mechanism."""
    subject = ContractCase.of(family)
    encoder = subject.encoder()
    return {
        "title": family.title,
        "family": encoder.family,
        "models": family.models,
        "example": family.example,
        **probed(encoder),
        "ways": {
            way: [f"{name}: {fault}" for name, fault in check(subject, way).items() if fault]
            for way in offered(encoder)
        },
    }


def probed(encoder: TimmEncoder) -> JsonObject:
    """Return what the adapter found out about the model."""
    stem = encoder.stem
    return {
        "stem": [f"{s.path} ({s.layout}, {s.stride} px)" for s in encoder.stems],
        "stride_px": encoder.stride,
        "dim": encoder.dim,
        "stem_dim": stem.dim if stem else None,
    }
