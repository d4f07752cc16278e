"""Probe timm models: whether the adapter supports a model, and what it finds."""

from __future__ import annotations

import fnmatch
import json
import shlex

from mpp.encoders.adapter import TimmEncoder
from mpp.encoders.creation import create_timm_model
from mpp.encoders.support import FAMILIES, TRIED, Family, table
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError
from mpp.objective import contract
from mpp.objective.contract import ContractCase
from mpp.recipe.flat import JsonObject


def probe(name: str) -> JsonObject:
    """Probe a model at its smallest size, and check whether it may be trained.

    Returns:
        Facts by name. "may_be_trained" is "yes", "yes, with a warning" or "no". If the model cannot be adapted, "why"
        has the reason.

    Raises:
        UserError: If timm has no such model.
    """
    try:
        subject, encoder = _smallest(name)
    except UserError as error:
        if "timm" in str(error).partition(":")[2] and "has no model" in str(error):
            raise
        return {"model": name, "may_be_trained": "no", "why": str(error)}
    facts, ways = contract.probed(encoder), contract.offered(encoder)
    of_class = [f for f in FAMILIES if f.family == encoder.family]
    named = [f for f in of_class if any(fnmatch.fnmatch(name, p) for p in f.models.split(", "))]
    parameters = [(p.numel(), p.requires_grad) for p in encoder.model.parameters()]
    leaks, tried = contract.check(subject, ways[0], ("no leak",))["no leak"], encoder.family in TRIED
    return {
        "model": name,
        "family": encoder.family,
        "parameters": sum(count for count, _ in parameters),
        "parameters_unread": sum(count for count, read in parameters if not read),
        "image_size": list(subject.image_size),
        "dim": facts["dim"],
        "stride_px": facts["stride_px"],
        "stem": list(facts["stem"]),
        "ways_of_masking": list(ways),
        "leak": leaks or None,
        "contract": [f.title for f in named or of_class] if tried else None,
        "toy": tiny_command(named[-1]) if named else None,
        "may_be_trained": "no" if leaks else "yes" if tried else "yes, with a warning",
    }


def probe_text(probed: JsonObject) -> str:
    """Return the facts of `probe` as text for the terminal."""
    name = probed["model"]
    if "why" in probed:
        return f"{name}\n  may be trained: no: {probed['why']}"
    size, ways = "×".join(map(str, probed["image_size"])), probed["ways_of_masking"]
    lines = [
        f"{name}: {probed['family']}, {probed['parameters'] / 1e6:.1f} M parameters, probed at {size} px",
        f"  features: {probed['dim']} channels, stride {probed['stride_px']} px; image sizes must be multiples of it",
        f"  stem: {' or '.join(probed['stem']) or 'none that can have mask tokens'}",
        f"  ways of masking: {', '.join(ways)}",
        f"  not pretrained, because no feature depends on them: {probed['parameters_unread']:,} parameters",
        f"  leak check ({ways[0]}): {probed['leak'] or 'no hidden pixel reaches a prediction'}",
    ]
    if probed["contract"] is not None:
        lines.append(f"  contract tests: pass for its family ({'; '.join(probed['contract'])})")
    else:
        lines.append(f"  contract tests: never run on a {probed['family']}; mpp models --check {name} runs them")
    if probed["toy"]:
        lines.append(f"  tested at a tiny size: {probed['toy']}")
    return "\n".join([*lines, f"  may be trained: {probed['may_be_trained']}"])


def tiny_overrides(family: Family) -> JsonObject:
    """Return the overrides that adapt recipes/pretrain/simmim_vit_b16.yaml (preset tiny) to another family."""
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in family.args.items()}
    has_stem = any(row["title"] == family.title and row["stem"] for row in table())
    return {
        "encoder.name": family.example,
        "encoder.args": args,
        "data.image_size": list(family.image_size),
        "mask.unit_px": None,
        **({} if has_stem else {"corruption": "pixel_patch"}),  # without a stem there is no place for mask tokens
    }


def tiny_command(family: Family) -> str:
    """Return the command that pretrains a toy model of a family, with `tiny_overrides`."""
    words = [shlex.quote(f"{key}={json.dumps(value)}") for key, value in tiny_overrides(family).items()]
    return f"mpp pretrain recipes/pretrain/simmim_vit_b16.yaml --preset tiny {' '.join(words)}"


def check(name: str) -> tuple[str, bool]:
    """Run the contract tests on a timm model at its smallest size.

    Returns:
        A report, and whether all tests passed.
    """
    subject, encoder = _smallest(name)
    lines, held = [f"{name}: {encoder.family} at {'×'.join(map(str, subject.image_size))} px"], True
    for way in contract.offered(encoder):
        for what, fault in contract.check(subject, way).items():
            lines.append(f"  {way}: {what}: {fault or 'holds'}")
            held = held and not fault
    lines.append(f"  may be trained: {'yes' if held else 'no'}")
    return "\n".join(lines), held


def _smallest(name: str) -> tuple[ContractCase, TimmEncoder]:
    """Build a model at the first size that it accepts: 2 × 3 cells, 4 × 4 cells, or its own size.

    Raises:
        UserError: If the model does not exist, or accepts none of these sizes.
    """
    model: TimmModel = create_timm_model(name, image_size=None, in_chans=3, pretrained=False, args={}, key="models")
    info = getattr(model, "feature_info", None)
    stride = info[-1]["reduction"] if info else 32
    *_, height, width = model.pretrained_cfg["input_size"]
    last: UserError | None = None
    own_size = (-(-height // stride) * stride, -(-width // stride) * stride)
    for size in ((2 * stride, 3 * stride), (4 * stride, 4 * stride), own_size):
        subject = ContractCase(name, {}, size)
        try:
            return subject, subject.encoder()
        except UserError as error:
            last = error
    raise last or UserError(f"models: {name}: no size to try")
