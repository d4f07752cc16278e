"""Libraries that a user could choose instead, used as their documentation does, on the workloads of `sizes`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sizes import (
    CROP_SCALE,
    EMBEDDED_BATCH,
    EMBEDDERS,
    EVALUATION_BATCH,
    MASK_RATIO,
    MEAN,
    SIZES,
    STD,
    Size,
    decoder_of,
)
from torch import Tensor, nn
from training import TrainStep, adamw, photographs, update


def _normalised(size: Size) -> Tensor:
    """Return images as loaders give them, (batch, 3, H, W) float32."""
    images = photographs(size.batch, size.image_px).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _timm(size: Size) -> Any:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size.image_px, patch_size=size.patch_px, embed_dim=size.dim, depth=size.depth,
        num_heads=size.heads, num_classes=0,
    )  # fmt: skip


def _lucidrains(size: Size) -> Any:
    """Return a ViT of vit-pytorch 1.26 with the batch axis that its MAE, SimMIM and MPP expect.

    The library keeps positions and class token without this axis.
    """
    from vit_pytorch import ViT

    model = ViT(
        image_size=size.image_px, patch_size=size.patch_px, num_classes=1, dim=size.dim, depth=size.depth,
        heads=size.heads, dim_head=size.dim // size.heads, mlp_dim=4 * size.dim,
    )  # fmt: skip
    for name in ("pos_embedding", "cls_token"):
        parameter = getattr(model, name)
        if parameter.ndim == 2:
            setattr(model, name, nn.Parameter(parameter.data[None]))
    return model


Build = Callable[[Size, str], tuple[nn.Module, Callable[[Tensor], Tensor]]]
"""(size, decoder) -> the model, and its loss as a function of normalised images."""


def vit_pytorch_mae(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from vit_pytorch.mae import MAE

    d = decoder_of(size, decoder)
    model = MAE(
        encoder=_lucidrains(size), masking_ratio=MASK_RATIO, decoder_dim=d.dim, decoder_depth=d.depth,
        decoder_heads=d.heads, decoder_dim_head=d.dim // d.heads,
    )  # fmt: skip
    return model, model


def vit_pytorch_simmim(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from vit_pytorch.simmim import SimMIM

    model = SimMIM(encoder=_lucidrains(size), masking_ratio=MASK_RATIO)
    return model, model


def vit_pytorch_mpp(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from vit_pytorch.mpp import MPP

    model = MPP(
        transformer=_lucidrains(size), patch_size=size.patch_px, dim=size.dim, mask_prob=MASK_RATIO,
        random_patch_prob=0.1, replace_prob=0.8,
    )  # fmt: skip
    return model, lambda images: model(images.clamp(0, 1))


def _hugging_face(size: Size, **more: Any) -> dict[str, Any]:
    return {
        "image_size": size.image_px, "patch_size": size.patch_px, "hidden_size": size.dim,
        "num_hidden_layers": size.depth, "num_attention_heads": size.heads, "intermediate_size": 4 * size.dim, **more,
    }  # fmt: skip


def transformers_mae(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    d = decoder_of(size, decoder)
    config = ViTMAEConfig(
        **_hugging_face(
            size, mask_ratio=MASK_RATIO, norm_pix_loss=True, decoder_hidden_size=d.dim,
            decoder_num_hidden_layers=d.depth, decoder_num_attention_heads=d.heads, decoder_intermediate_size=4 * d.dim,
        )
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    return model, lambda images: model(pixel_values=images).loss


def transformers_simmim(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    model = ViTForMaskedImageModeling(ViTConfig(**_hugging_face(size, encoder_stride=size.patch_px)))
    hidden = round(MASK_RATIO * size.cells)

    def loss(images: Tensor) -> Tensor:
        places = torch.rand(len(images), size.cells, device=images.device).argsort(1)[:, :hidden]
        mask = torch.zeros(len(images), size.cells, device=images.device).scatter_(1, places, 1.0).bool()
        found: Tensor = model(pixel_values=images, bool_masked_pos=mask).loss
        return found

    return model, loss


def lightly_mae(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    d = decoder_of(size, decoder)

    class Mae(nn.Module):
        """MAE after examples/pytorch/mae.py of lightly 1.6."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=_timm(size))
            self.decoder = MAEDecoderTIMM(
                num_patches=size.cells, patch_size=size.patch_px, embed_dim=size.dim, decoder_embed_dim=d.dim,
                decoder_depth=d.depth, decoder_num_heads=d.heads,
            )  # fmt: skip

        def forward(self, images: Tensor) -> Tensor:
            keep, mask = utils.random_token_mask(size=(len(images), size.cells + 1), mask_ratio=MASK_RATIO)
            encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
            masked = utils.repeat_token(self.decoder.mask_token, (len(images), size.cells + 1))
            masked = utils.set_at_index(masked, keep, encoded.type_as(masked))
            decoded = self.decoder.decode(masked)
            predicted = self.decoder.predict(utils.get_at_index(decoded, mask))
            target = utils.get_at_index(utils.patchify(images, size.patch_px), mask - 1)
            return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target))

    model = Mae()
    return model, model


def stable_mae(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from stable_pretraining.methods import MAE

    d = decoder_of(size, decoder)
    model = MAE(_timm(size), d.dim, d.depth, d.heads, mask_ratio=MASK_RATIO)
    return model, lambda images: model(images).loss


def stable_crossmae(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from stable_pretraining.methods import CrossMAE

    d = decoder_of(size, decoder)
    model = CrossMAE(
        _timm(size), d.dim, d.depth, d.heads, mask_ratio=MASK_RATIO, kept_mask_ratio=0.25, image_size=size.image_px
    )
    return model, lambda images: model(images).loss


def stable_simmim(size: Size, decoder: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from stable_pretraining.methods import SimMIM

    model = SimMIM(_timm(size), size.patch_px, MASK_RATIO, image_size=size.image_px)
    return model, lambda images: model(images).loss


MODELS: dict[str, Build] = {
    "vit-pytorch MAE": vit_pytorch_mae,
    "transformers MAE": transformers_mae,
    "lightly MAE": lightly_mae,
    "stable-pretraining MAE": stable_mae,
    "stable-pretraining CrossMAE": stable_crossmae,
    "vit-pytorch SimMIM": vit_pytorch_simmim,
    "transformers SimMIM": transformers_simmim,
    "stable-pretraining SimMIM": stable_simmim,
    "vit-pytorch MPP": vit_pytorch_mpp,
}


def _step(name: str) -> Callable[..., TrainStep]:
    def build(size: str, decoder: str, precision: str, device: str = "cpu", batch: int = 0) -> TrainStep:
        torch.manual_seed(0)
        s = SIZES[size]._replace(batch=batch) if batch else SIZES[size]
        images = _normalised(s).to(device)
        model, loss = MODELS[name](s, decoder)
        return TrainStep(model.to(device), lambda: loss(images), len(images), precision, device)

    return build


STEP = {name: _step(name) for name in MODELS}


class Input:
    """A loader to be timed. A unit of work is one batch, and the loader starts again at its end."""

    def __init__(self, make: Callable[[], Any], batch: int) -> None:
        self.make, self.batch = make, batch
        self.iterator = iter(make())
        self.facts: dict[str, Any] = {}

    def batch_of_images(self) -> Tensor:
        found = next(self.iterator, None)
        if found is None:
            self.iterator = iter(self.make())
            found = next(self.iterator)
        return found

    def run(self, batches: int) -> int:
        return sum(len(self.batch_of_images()) for _ in range(batches))


def _transform(side_px: int) -> Any:
    """Return the transform of MAE, He et al. 2022, appendix A.1, as in its published code, lightly and later papers."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side_px, CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def image_folder(pictures: str, side_px: int, batch: int, workers: int = 0) -> Input:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    loader = DataLoader(
        ImageFolder(pictures, _transform(side_px)), batch, shuffle=True, drop_last=True, num_workers=workers
    )
    return Input(lambda: (images for images, _ in loader), batch)


def plain_webdataset(pictures: str, side_px: int, batch: int, workers: int = 0) -> Input:
    import webdataset as wds

    shards = sorted(str(p) for p in Path(f"{pictures}-shards").glob("*.tar"))
    data = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_transform(side_px))
        .batched(batch, partial=False)
    )
    return Input(lambda: (images for (images,) in wds.WebLoader(data, batch_size=None, num_workers=workers)), batch)


def lightly_dataset(pictures: str, side_px: int, batch: int, workers: int = 0) -> Input:
    from lightly.data import LightlyDataset
    from lightly.transforms import MAETransform
    from torch.utils.data import DataLoader

    data = LightlyDataset(pictures, transform=MAETransform(input_size=side_px))
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=workers)
    return Input(lambda: (views[0] for views, *_ in loader), batch)


LOADERS: dict[str, Callable[..., Input]] = {
    "torchvision ImageFolder": image_folder,
    "webdataset + torchvision": plain_webdataset,
    "lightly": lightly_dataset,
}


def _in_one_thread(make: Callable[..., Input]) -> Callable[..., Input]:
    def build(**settings: Any) -> Input:
        torch.set_num_threads(1)  # as in a dataloader worker
        return make(**settings)

    return build


INPUT = {name: _in_one_thread(make) for name, make in LOADERS.items()}


class Kept:
    """Checkpoints to be timed. A unit of work is one save, resume or export, without images."""

    def __init__(self, size: str, folder: str, operation: str) -> None:
        model, loss = MODELS["transformers MAE"](SIZES[size], "small")
        images = _normalised(SIZES[size])
        self.step = TrainStep(model, lambda: loss(images), len(images), "fp32")
        self.file, self.operation = Path(folder) / "peer.pt", operation
        self.facts: dict[str, Any] = {}
        self._save()

    def _save(self) -> None:
        torch.save({"model": self.step.model.state_dict(), "optimizer": self.step.optimizer.state_dict()}, self.file)

    def run(self, times: int) -> int:
        for _ in range(times):
            if self.operation == "save":
                self._save()
            elif self.operation == "export":
                encoder: Any = self.step.model.get_submodule("vit")  # a transformers.PreTrainedModel
                encoder.save_pretrained(self.file.with_suffix(""))
            else:
                state = torch.load(self.file, weights_only=True)
                self.step.model.load_state_dict(state["model"])
                self.step.optimizer.load_state_dict(state["optimizer"])
        return times


class Evaluate:
    """kNN on a ViT's pooled features of the folders that ours made: timm, torchvision and lightly's `knn_predict`."""

    def __init__(self, size: str, folder: str) -> None:
        self.model, self.folder, self.facts = _timm(SIZES[size]).eval(), Path(folder) / "labeled", dict[str, Any]()

    @torch.no_grad()
    def _features(self, part: str) -> tuple[Tensor, Tensor]:
        from torch.utils.data import DataLoader
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        steps = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
        transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        loader = DataLoader(ImageFolder(self.folder / part, transform), EVALUATION_BATCH)
        found = [(self.model(images), labels) for images, labels in loader]
        return torch.cat([f for f, _ in found]), torch.cat([labels for _, labels in found])

    def run(self, times: int) -> int:
        from lightly.utils.benchmarking.knn import knn_predict

        for _ in range(times):
            (train, train_labels), (val, labels) = self._features("train"), self._features("val")
            bank = nn.functional.normalize(train, dim=1).T.contiguous()
            predicted = knn_predict(nn.functional.normalize(val, dim=1), bank, train_labels, 2, knn_k=10)
            float((predicted[:, 0] == labels).float().mean())
        return times


KEEP: dict[str, Callable[..., Any]] = {
    "torch.save": lambda **given: Kept(**given, operation="save"),
    "torch.load": lambda **given: Kept(**given, operation="resume"),
    "transformers save_pretrained": lambda **given: Kept(**given, operation="export"),
    "timm, lightly knn_predict": Evaluate,
}


class Embed:
    """Vectors of a folder of images by timm and torchvision. A unit of work is a pass over all images."""

    def __init__(self, encoder: str, folder: str, images: str) -> None:
        import timm

        chosen = EMBEDDERS[encoder]
        args: dict[str, Any] = {**chosen.args, **({"img_size": chosen.image_px} if "vit" in chosen.name else {})}
        self.model = timm.create_model(chosen.name, num_classes=0, **args).eval()
        self.images, self.image_px, self.facts = images, chosen.image_px, dict[str, Any]()

    @torch.inference_mode()
    def run(self, times: int) -> int:
        from torch.utils.data import DataLoader
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        side = self.image_px
        steps = [transforms.Resize(side, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side)]
        transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        images = 0
        for _ in range(times):
            loader = DataLoader(ImageFolder(self.images, transform), EMBEDDED_BATCH)
            images += len(torch.cat([self.model(batch) for batch, _ in loader]).numpy())
        return images


EMBED: dict[str, Callable[..., Embed]] = {"timm + torchvision": Embed}


def train(model_name: str, loader_name: str, size_name: str, pictures: str, steps: int, workers: int) -> None:
    """Train as a user's script would, and print a line for each step."""
    size = SIZES[size_name]
    torch.manual_seed(0)
    model, loss_of = MODELS[model_name](size, "small")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters)
    source = LOADERS[loader_name](pictures, size.image_px, size.batch, workers)
    for step in range(steps):
        loss = loss_of(source.batch_of_images())
        update(loss, parameters, optimizer)
        print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{pictures}-checkpoint.pt")


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], steps=int(sys.argv[5]), workers=int(sys.argv[6]))
