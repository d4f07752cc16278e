"""Low-rank adapters in an encoder (LoRA, Hu et al. 2022), by peft. They have few weights and merge into the encoder."""

from __future__ import annotations

from torch import nn

from mpp.errors import UserError


def add(encoder: nn.Module, *, rank: int, alpha: int, dropout: float) -> None:
    """Add an adapter to every trainable linear layer and 1×1 convolution of the encoder, and freeze all other weights.

    New adapters do not change the outputs.

    Args:
        encoder: Encoder, adapted in place.
        rank: Rank of the adapters.
        alpha: Scale of the adapters times `rank`: their outputs are multiplied by alpha / rank.
        dropout: Probability of dropout on the input of each adapter.

    Raises:
        UserError: If peft is not installed, or the encoder has no such layers.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise UserError("lora: requires the package peft: pip install peft") from error
    # layers that the task does not read are already frozen; adapters there would get no gradient
    names = [n for n, module in encoder.named_modules() if _is_linear(module) and module.weight.requires_grad]
    if not names:
        raise UserError(f"lora: {type(encoder).__name__} has no linear layers for adapters")
    # the returned wrapper is not needed, because peft adds the adapters to the encoder in place
    LoraModel(encoder, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names), "default")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def merge(encoder: nn.Module) -> None:
    """Merge the adapters into the weights of their layers. The encoder becomes plain again, with its original names."""
    from peft.tuners.lora import LoraLayer

    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLayer):
                found = layer
                found.merge()
                setattr(parent, name, found.get_base_layer())
