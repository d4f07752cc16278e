"""Models and images that the benchmarks use, the same for every contestant."""

from __future__ import annotations

from typing import NamedTuple


class Decoder(NamedTuple):
    """Decoder of MAE-like contestants."""

    dim: int
    depth: int
    heads: int


class Size(NamedTuple):
    """A ViT and its batch."""

    image_px: int
    patch_px: int
    dim: int
    depth: int
    heads: int
    batch: int
    small: Decoder
    """Decoder of four blocks: as good as eight when fine-tuned (MAE, He et al. 2022, table 1a)."""

    @property
    def cells(self) -> int:
        return (self.image_px // self.patch_px) ** 2


MASK_RATIO = 0.75
MAE_DECODER = Decoder(512, 8, 16)
"""Decoder for any encoder: MAE, He et al. 2022, section 3 and appendix A.1."""
SIZES = {
    "tiny": Size(16, 4, 32, 2, 2, 4, Decoder(32, 1, 2)),
    "32px": Size(32, 4, 192, 12, 3, 64, Decoder(192, 4, 3)),
    "vit_s": Size(224, 16, 384, 12, 6, 8, Decoder(256, 4, 8)),
    "vit_b": Size(224, 16, 768, 12, 12, 4, Decoder(384, 4, 12)),
    "vit_l": Size(224, 16, 1024, 24, 16, 2, Decoder(512, 4, 16)),
    "vit_h": Size(224, 14, 1280, 32, 16, 1, Decoder(512, 4, 16)),
}


class Embedder(NamedTuple):
    """An encoder that computes vectors of images."""

    name: str
    args: dict[str, object]
    """Arguments of timm's function of this name."""
    image_px: int


EMBEDDERS = {
    "resnet": Embedder("resnet18d", {"channels": [32, 64, 128, 256], "stem_width": 16}, 64),  # of `small_images`
    "vit": Embedder("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}, 32),
}
EMBEDDED_BATCH = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def decoder_of(size: Size, name: str) -> Decoder:
    """Return the decoder of a size by name, "small" or "mae"."""
    return {"small": size.small, "mae": MAE_DECODER}[name]


EVALUATION_BATCH = 16
CROP_SCALE = (0.2, 1.0)
"""Range of the area of random crops: MAE, He et al. 2022, appendix A.1."""
