"""Low-rank adapters in an encoder (LoRA, Hu et al. 2022), by peft: few weights learn, and merge into plain ones."""

from __future__ import annotations

from torch import nn

from mpp.errors import UserError


def add(encoder: nn.Module, *, rank: int, alpha: int, dropout: float) -> None:
    """Put an adapter beside every linear layer of the encoder that learns, and 1×1 convolution; freeze all the rest.

    As they begin, they change nothing.

    Args:
        encoder: What is adapted, in place.
        rank: Of the adapters.
        alpha: alpha / rank is their scale.
        dropout: Before each.

    Raises:
        UserError: peft is not there, or there are no such layers.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise UserError("lora: requires the package peft: pip install peft") from error
    # what the task does not read was frozen before, and adapters there would get no gradient
    names = [n for n, module in encoder.named_modules() if _is_linear(module) and module.weight.requires_grad]
    if not names:
        raise UserError(f"lora: {type(encoder).__name__} has no linear layers for adapters")
    # the wrapper is not needed: it has put the adapters into the encoder itself
    LoraModel(encoder, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names), "default")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def merge(encoder: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, which gives the plain encoder again, with its own names."""
    from peft.tuners.lora import LoraLayer

    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLayer):
                found = layer
                found.merge()
                setattr(parent, name, found.get_base_layer())
